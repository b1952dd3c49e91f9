//! Which cluster a command is about.

use std::path::{Path, PathBuf};

use cairn_client::config::Config;
use cairn_meta::client::MetaClient;

use crate::args::Global;
use crate::failure::Failure;
use crate::limits::META_DEADLINE;

/// Where a configuration file is looked for when none is named: what `cairn dev` makes, then the machine's.
const DEFAULT_FILES: [&str; 2] = ["cairn-data/cairn.toml", "/etc/cairn/cairn.toml"];

/// The configuration that was named, or the first default that exists, or none; with the file that it is from.
pub(crate) fn load_config(global: &Global) -> Result<(Config, Option<PathBuf>), Failure> {
    if let Some(path) = &global.config {
        return Ok((Config::load(path)?, Some(path.clone())));
    }
    // Addresses on the command line are enough, and are not to be mixed with a file that nobody named.
    let mut files = DEFAULT_FILES.iter().map(Path::new);
    match files.find(|path| global.meta.is_empty() && path.exists()) {
        Some(path) => Ok((Config::load(path)?, Some(path.to_path_buf()))),
        None => Ok((Config::default(), None)),
    }
}

/// The configuration that was named, or none: what runs a part of a cluster takes no default file by accident.
pub(crate) fn load_named_config(global: &Global) -> Result<Config, Failure> {
    match &global.config {
        Some(path) => Ok(Config::load(path)?),
        None => Ok(Config::default()),
    }
}

/// The metadata servers' addresses: the flag, else the file.
pub(crate) fn meta_addresses(global: &Global, config: &Config) -> Result<Vec<String>, Failure> {
    let addresses = if global.meta.is_empty() {
        &config.cluster.meta
    } else {
        &global.meta
    };
    if addresses.is_empty() {
        return Err(Failure::usage("no metadata server is named").hint(
            "Say --meta HOST:PORT,... or --config FILE (a file with `meta = [...]` under [cluster]); `cairn dev` starts a \
             cluster here and writes such a file.",
        ));
    }
    Ok(addresses.clone())
}

/// A client of the cluster's metadata servers, with a bounded patience.
pub(crate) fn meta_client(global: &Global) -> Result<MetaClient, Failure> {
    let (config, _) = load_config(global)?;
    Ok(MetaClient::new(meta_addresses(global, &config)?).with_deadline(META_DEADLINE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_goes_before_the_file_and_one_of_them_must_be() {
        let mut config = Config::default();
        let mut global = Global::default();
        let failure = meta_addresses(&global, &config).unwrap_err();
        assert_eq!(failure.kind.exit_code(), 2);
        config.cluster.meta = vec!["file:1".to_string()];
        assert_eq!(meta_addresses(&global, &config).unwrap(), ["file:1"]);
        global.meta = vec!["flag:1".to_string()];
        assert_eq!(meta_addresses(&global, &config).unwrap(), ["flag:1"]);
    }
}
