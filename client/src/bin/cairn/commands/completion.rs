//! `cairn completion`.

use clap::CommandFactory as _;

use crate::args::{Cli, Completion};
use crate::failure::Failure;
use crate::output;

pub(crate) fn run(args: &Completion) -> Result<(), Failure> {
    output::print(&script(args.shell))
}

fn script(shell: clap_complete::Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "cairn", &mut script);
    String::from_utf8(script).expect("scripts are text")
}

#[cfg(test)]
mod tests {
    use clap_complete::Shell;

    use super::*;

    #[test]
    fn each_shell_gets_a_script_that_knows_the_commands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = script(shell);
            for word in ["volume", "grow", "inspect", "wipe-foreign"] {
                assert!(script.contains(word), "{shell}: {word}");
            }
        }
    }
}
