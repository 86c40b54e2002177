//! The command line.

use std::ffi::OsString;

use clap::{Parser, Subcommand};

use crate::caches::{ListOptions, PruneOptions};
#[cfg(feature = "serve")]
use crate::serve::Options;

/// The GitHub Action that makes sccache work on GitHub's cache.
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
    /// The action's main step: install sccache, start its server, try it, tell later steps
    ///
    /// Reads its inputs from INPUT_* variables and writes to the files that GITHUB_ENV,
    /// GITHUB_PATH, GITHUB_OUTPUT and GITHUB_STATE name, as the runner has it.
    Setup,
    /// The action's post step: tell how it went, stop the server
    Report,
    /// The packed relay between sccache and GitHub's cache. The main step starts it
    ///
    /// Reads its configuration from standard input and says its port on standard output.
    #[command(hide = true)]
    Relay,
    /// A cache service that speaks GitHub's protocols: for self-hosted runners, act, Gitea, Forgejo
    ///
    /// Says on standard output which variables its clients need. Without an option that says who
    /// is let in, that is the bearer of a token which is made at the start and printed there.
    #[cfg(feature = "serve")]
    Serve(Box<Options>),
    /// A whole job on this machine, cold and then warm: set-up, a build, the summary
    ///
    /// Without a command it builds a small Rust and C project that it brings along. Other inputs of
    /// the action are taken from INPUT_* variables.
    Rehearse {
        /// The version of sccache: exact, a range or `latest`. Without it as without the input `version`
        #[arg(long)]
        sccache: Option<String>,
        /// Where objects are kept, as the input `mode` has it. In mode local both jobs share a disk,
        /// as they do on a self-hosted runner
        #[arg(long)]
        mode: Option<String>,
        /// Where sccache may come from, as the input `install-from` has it
        #[arg(long)]
        install_from: Option<String>,
        /// The build to run, twice. It should begin by removing what it built before
        #[arg(last = true, value_name = "COMMAND")]
        build: Vec<OsString>,
    },
    /// The statistics of this job's sccache server so far, as a table
    Stats {
        /// As Markdown, as the job summary has it
        #[arg(long, conflicts_with = "json")]
        markdown: bool,
        /// As JSON; the documentation of `action::stats::json` says what is in it
        #[arg(long)]
        json: bool,
    },
    /// Say what is wrong with the cache of this job or machine, and how to mend it
    ///
    /// A line for each check: ok, note or wrong; below each that is not ok what can be done. Ends
    /// with status 1 where something is wrong. No token is shown.
    Doctor {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// The entries of a repository's cache: what there is, and away with what nobody needs
    #[command(subcommand)]
    Caches(CachesCommand),
}

/// What is done with a repository's cache.
#[derive(Debug, Subcommand)]
pub enum CachesCommand {
    /// List this action's packs: size, age, when they were last used
    List(ListOptions),
    /// Say which entries would be deleted, and with --yes delete them
    ///
    /// What other tools stored is never deleted, but by its exact key.
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
