//! Compiles the control plane's .proto files in pure Rust: no `protoc` is needed.

use std::error::Error;

const FILES: [&str; 4] = ["types.proto", "control.proto", "node.proto", "member.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CONTROL").is_none() {
        return Ok(());
    }
    let descriptors = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
