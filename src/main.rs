//! The command line: which part of the library this process is.

use std::ffi::OsString;
use std::io::{self, BufRead, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use sccache_action::action::environment::Environment;
use sccache_action::action::setup::Outcome;
use sccache_action::action::workflow_command::{Log, Reader};
use sccache_action::action::{report, setup, stats};
use sccache_action::caches;
use sccache_action::cli::{CachesCommand, Cli, Command};
use sccache_action::doctor;
use sccache_action::rehearse::{self, Rehearsal};
use sccache_action::relay;
#[cfg(feature = "serve")]
use sccache_action::serve;
use sccache_action::wrapper;

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let argv0 = arguments.next().unwrap_or_default();
    if wrapper::is_wrapper(&argv0) {
        let arguments: Vec<OsString> = arguments.collect();
        let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from(argv0));
        return wrapper::run(&program, &arguments);
    }
    let cli = Cli::parse();
    match dispatch(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sccache-action: {error}");
            // Not 1, which the launcher takes for a failure that the user asked to see.
            ExitCode::from(3)
        }
    }
}

fn dispatch(command: Command) -> Result<ExitCode, Failure> {
    // The steps wait for one thing at a time; a second thread would only cost its start.
    let runtime = match command {
        Command::Setup
        | Command::Report
        | Command::Stats { .. }
        | Command::Caches(_)
        | Command::Doctor { .. } => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    }
    .enable_all()
    .build()?;
    runtime.block_on(run(command))
}

async fn run(command: Command) -> Result<ExitCode, Failure> {
    let environment = Environment::of_this_process();
    let log = || {
        let is_set = |name, value| environment.get(name) == Some(value);
        let reader = match is_set("GITHUB_ACTIONS", "true") {
            true => Reader::Runner,
            false => Reader::Person,
        };
        Log::new(io::stdout(), reader, is_set("RUNNER_DEBUG", "1"))
    };
    match command {
        Command::Setup => {
            let program = std::env::current_exe()?;
            match setup::run_unless_cancelled(&environment, &program, &log()).await {
                Outcome::Done => Ok(ExitCode::SUCCESS),
                Outcome::Failed => Ok(ExitCode::FAILURE),
            }
        }
        Command::Report => {
            let program = std::env::current_exe()?;
            match report::run(&environment, &program, &log()).await {
                report::Outcome::Done => Ok(ExitCode::SUCCESS),
                report::Outcome::Failed => Ok(ExitCode::FAILURE),
            }
        }
        Command::Relay => {
            let mut config = Vec::new();
            io::stdin().lock().read_until(b'\n', &mut config)?;
            relay::run(&config, io::stdout(), abandoned()).await?;
            Ok(ExitCode::SUCCESS)
        }
        #[cfg(feature = "serve")]
        Command::Serve(options) => {
            serve::run(*options).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Stats { markdown, json } => {
            let form = match (markdown, json) {
                (true, _) => stats::Form::Markdown,
                (false, true) => stats::Form::Json,
                (false, false) => stats::Form::Table,
            };
            tell(&stats::run(&environment, form).await?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Doctor { json } => {
            let program = std::env::current_exe()?;
            let findings = doctor::examine(&environment, &program).await;
            match json {
                true => tell(&format!("{:#}\n", doctor::json(&findings)))?,
                false => tell(&doctor::text(&findings))?,
            }
            Ok(match doctor::is_well(&findings) {
                true => ExitCode::SUCCESS,
                false => ExitCode::FAILURE,
            })
        }
        Command::Caches(CachesCommand::List(options)) => {
            tell(&caches::list(&environment, &options).await?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Caches(CachesCommand::Prune(options)) => {
            let pruned = caches::prune(&environment, &options).await?;
            tell(&pruned.text)?;
            Ok(match pruned.complete {
                true => ExitCode::SUCCESS,
                false => ExitCode::FAILURE,
            })
        }
        Command::Rehearse {
            sccache,
            mode,
            install_from,
            build,
        } => {
            let mut environment = environment.clone();
            let inputs = [
                ("INPUT_VERSION", sccache),
                ("INPUT_MODE", mode),
                ("INPUT_INSTALL-FROM", install_from),
            ];
            for (input, value) in inputs {
                if let Some(value) = value {
                    environment.set(input, value);
                }
            }
            let rehearsal = Rehearsal {
                program: std::env::current_exe()?,
                environment,
                build,
            };
            let results = rehearse::run(&rehearsal).await?;
            for result in &results {
                println!(
                    "\n=== {} job: the summary\n\n{}",
                    result.job, result.summary
                );
            }
            println!("{}", rehearse::table(&results));
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Prints the outcome of a command. Whoever has read enough of it has not made it fail.
fn tell(text: &str) -> io::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

/// Ends where standard input does so before it said that the relay is to live on.
async fn abandoned() {
    let (tell, told) = tokio::sync::oneshot::channel();
    // A thread of its own, since a read that is under way keeps a runtime from ending.
    std::thread::spawn(move || {
        let is_untied = matches!(io::stdin().read(&mut [0]), Ok(1));
        let _ = tell.send(is_untied);
    });
    if told.await == Ok(true) {
        std::future::pending::<()>().await;
    }
}
