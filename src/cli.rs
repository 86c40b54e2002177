//! The command line.

use std::ffi::OsString;

use clap::{Parser, Subcommand};

use crate::commands::caches::{ListOptions, PruneOptions};
#[cfg(feature = "serve")]
use crate::serve::command::ServeOptions;

/// The GitHub Action that runs sccache on GitHub's cache.
#[derive(Debug, Parser)]
#[command(version, about, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the binary does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The action's main step: install sccache, start its server, test it, set up later steps
    ///
    /// Reads its inputs from INPUT_* variables, and writes to the runner's files in GITHUB_ENV,
    /// GITHUB_PATH, GITHUB_OUTPUT and GITHUB_STATE.
    Setup,
    /// The action's post step: report the results, stop the server
    Report,
    /// The packed relay between sccache and GitHub's cache. The main step starts it
    ///
    /// Reads its configuration from standard input and prints its port on standard output.
    #[command(hide = true)]
    Relay,
    /// Run a cache service that speaks GitHub's protocols: for self-hosted runners, act, Gitea,
    /// Forgejo
    ///
    /// Prints the variables that its clients need on standard output. Without an option for tokens
    /// it makes a token at the start and prints it there.
    #[cfg(feature = "serve")]
    Serve(Box<ServeOptions>),
    /// Run a whole job on this machine, cold and then warm: set-up, a build, the summary
    ///
    /// Without a command it builds its own small project in Rust and C. It reads the action's other
    /// inputs from INPUT_* variables.
    Rehearse {
        /// The version of sccache: exact, a range or `latest`. The default is that of the input
        /// `version`
        #[arg(long)]
        sccache: Option<String>,
        /// The storage for objects, as in the input `mode`. In mode local both jobs share a disk,
        /// as on a self-hosted runner
        #[arg(long)]
        mode: Option<String>,
        /// The sources of sccache, as in the input `install-from`
        #[arg(long)]
        install_from: Option<String>,
        /// The build to run, twice. It should first remove its earlier results
        #[arg(last = true, value_name = "COMMAND")]
        build: Vec<OsString>,
    },
    /// Print the statistics of this job's sccache server so far, as a table
    Stats {
        /// As Markdown, as in the job summary
        #[arg(long, conflicts_with = "json")]
        markdown: bool,
        /// As JSON; docs/stats.md describes the fields
        #[arg(long)]
        json: bool,
    },
    /// Diagnose cache problems of this job or machine, and suggest fixes
    ///
    /// Prints a line for each check: ok, note or error. A fix follows each note and error. Exits
    /// with status 1 if there is an error. Shows no token.
    Doctor {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// List or delete the entries of a repository's cache
    #[command(subcommand)]
    Caches(CachesCommand),
}

/// What is done with a repository's cache.
#[derive(Debug, Subcommand)]
pub enum CachesCommand {
    /// List this action's packs: size, age, last use
    List(ListOptions),
    /// List the entries to delete, and delete them with --yes
    ///
    /// Deletes another tool's entry only by its exact key.
    Prune(PruneOptions),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_prune_must_say_what_and_cannot_say_it_twice_over() {
        for (options, is_right) in [
            (&[][..], false),
            (&["--yes"], false),
            (&["--unused", "7d"], true),
            (
                &["--unused", "7d", "--merged", "--namespace", "a", "--yes"],
                true,
            ),
            (&["--objects", "--unused", "1day"], true),
            (&["--objects", "--namespace", "a"], false),
            (&["--key", "a", "--key", "b"], true),
            (&["--key", "a", "--merged"], false),
        ] {
            let arguments = ["x", "caches", "prune"].iter().chain(options);
            assert_eq!(
                Cli::try_parse_from(arguments).is_ok(),
                is_right,
                "{options:?}"
            );
        }
    }

    #[test]
    fn a_build_to_rehearse_is_taken_as_it_is() {
        let cli = Cli::try_parse_from(["x", "rehearse", "--", "make", "--jobs=2", "-k"]).unwrap();
        let Command::Rehearse { build, .. } = cli.command else {
            panic!("{cli:?}");
        };
        assert_eq!(build, ["make", "--jobs=2", "-k"]);
    }
}
