//! Which cluster a command is about: what stands on the command line goes before the environment, and that before the
//! files that are looked for.

use std::path::{Path, PathBuf};

use cairn_client::config::Config;
use cairn_meta::client::MetaClient;

use crate::args::{Global, host_port};
use crate::failure::Failure;
use crate::limits::META_DEADLINE;

/// Names a configuration file.
pub(crate) const CONFIG_VARIABLE: &str = "CAIRN_CONFIG";
/// Names metadata servers.
pub(crate) const META_VARIABLE: &str = "CAIRN_META";

/// Where a configuration file is looked for when none is named: what `cairn dev` makes, then the machine's.
const DEFAULT_FILES: [&str; 2] = ["cairn-data/cairn.toml", "/etc/cairn/cairn.toml"];

/// What the environment says.
#[derive(Clone, Debug, Default)]
struct Environment {
    config: Option<PathBuf>,
    meta: Option<String>,
}

impl Environment {
    fn read() -> Environment {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        Environment {
            config: variable(CONFIG_VARIABLE).map(PathBuf::from),
            meta: variable(META_VARIABLE).map(|value| value.to_string_lossy().into_owned()),
        }
    }
}

/// The configuration that was named, or none: what runs a part of a cluster takes no file that nobody named.
pub(crate) fn named_config(global: &Global) -> Result<Config, Failure> {
    match global.config.clone().or_else(|| Environment::read().config) {
        Some(path) => Ok(Config::load(&path)?),
        None => Ok(Config::default()),
    }
}

/// The configuration of the cluster that a command is about: the one that was named, or the one that is found where nothing names
/// a cluster.
pub(crate) fn command_config(global: &Global) -> Result<Config, Failure> {
    let environment = Environment::read();
    if let Some(path) = global.config.as_ref().or(environment.config.as_ref()) {
        return Ok(Config::load(path)?);
    }
    let found = DEFAULT_FILES.iter().map(Path::new).find(|path| path.exists());
    match found {
        Some(path) if global.meta.is_empty() && environment.meta.is_none() => Ok(Config::load(path)?),
        _ => Ok(Config::default()),
    }
}

/// The metadata servers of a process: the flag, else its configuration, else the environment.
pub(crate) fn process_meta_addresses(global: &Global, config: &Config) -> Result<Vec<String>, Failure> {
    first_addresses([
        Some(global.meta.clone()),
        Some(config.cluster.meta.clone()),
        environment_addresses(&Environment::read())?,
    ])
}

/// A client of the cluster's metadata servers, with a bounded patience.
pub(crate) fn meta_client(global: &Global) -> Result<MetaClient, Failure> {
    let addresses = meta_addresses(global, &Environment::read(), &DEFAULT_FILES)?;
    Ok(MetaClient::new(addresses).with_deadline(META_DEADLINE))
}

fn meta_addresses(global: &Global, environment: &Environment, files: &[&str]) -> Result<Vec<String>, Failure> {
    if !global.meta.is_empty() {
        return Ok(global.meta.clone());
    }
    if let Some(path) = &global.config {
        return addresses_of(path);
    }
    if let Some(addresses) = environment_addresses(environment)? {
        return Ok(addresses);
    }
    if let Some(path) = &environment.config {
        return addresses_of(path);
    }
    match files.iter().map(Path::new).find(|path| path.exists()) {
        Some(path) => addresses_of(path),
        None => first_addresses([]),
    }
}

fn environment_addresses(environment: &Environment) -> Result<Option<Vec<String>>, Failure> {
    let parse = |text: &String| text.split(',').map(host_port).collect::<Result<Vec<_>, _>>();
    let addresses = environment.meta.as_ref().map(parse).transpose();
    addresses.map_err(|error| Failure::usage(format!("{META_VARIABLE} names no metadata servers: {error}")))
}

fn addresses_of(path: &Path) -> Result<Vec<String>, Failure> {
    let addresses = Config::load(path)?.cluster.meta;
    if addresses.is_empty() {
        return Err(Failure::usage(format!("{} names no metadata server", path.display()))
            .hint("Write `meta = [\"HOST:PORT\"]` under [cluster] there, or say --meta HOST:PORT,..."));
    }
    Ok(addresses)
}

fn first_addresses<const N: usize>(choices: [Option<Vec<String>>; N]) -> Result<Vec<String>, Failure> {
    let mut choices = choices.into_iter().flatten();
    choices.find(|addresses| !addresses.is_empty()).ok_or_else(|| {
        Failure::usage("no metadata server is named").hint(
            "Say --meta HOST:PORT,... or --config FILE (a file with `meta = [...]` under [cluster]). `cairn dev` starts \
             a cluster here and writes such a file.",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_goes_before_the_environment_and_that_before_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, format!("version = 1\n[cluster]\nmeta = ['{name}:1']\n")).unwrap();
            path
        };
        let default = file("default");
        let files = [default.to_str().unwrap()];
        let global = |meta: &str, config: Option<PathBuf>| Global {
            config,
            meta: meta.split_whitespace().map(str::to_string).collect(),
            ..Global::default()
        };
        let environment = |meta: Option<&str>, config: Option<PathBuf>| Environment {
            meta: meta.map(str::to_string),
            config,
        };
        let full = environment(Some("env:1,env:2"), Some(file("env-file")));
        let found = |global: &Global, environment: &Environment| meta_addresses(global, environment, &files).unwrap();
        assert_eq!(found(&global("flag:1", Some(file("named"))), &full), ["flag:1"]);
        assert_eq!(found(&global("", Some(file("named"))), &full), ["named:1"]);
        assert_eq!(found(&global("", None), &full), ["env:1", "env:2"]);
        assert_eq!(
            found(&global("", None), &environment(None, full.config.clone())),
            ["env-file:1"]
        );
        assert_eq!(found(&global("", None), &environment(None, None)), ["default:1"]);
        let failure = meta_addresses(&global("", None), &environment(None, None), &[]).unwrap_err();
        assert!(
            failure.kind.exit_code() == 2 && failure.to_string().contains("--meta"),
            "{failure}"
        );
        let failure = meta_addresses(&global("", None), &environment(Some("x"), None), &[]).unwrap_err();
        assert!(failure.what.contains(META_VARIABLE), "{failure}");
    }

    #[test]
    fn a_file_without_addresses_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty.toml");
        std::fs::write(&path, "version = 1\n").unwrap();
        assert!(
            addresses_of(&path)
                .unwrap_err()
                .what
                .contains("empty.toml names no metadata server")
        );
    }
}
