//! The entry point: runs the command that the command line names.

use std::ffi::OsString;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use sccache_action::action::report::{self, ReportOutcome};
use sccache_action::action::setup::{self, SetupOutcome};
use sccache_action::cli::{CachesCommand, Cli, Command};
use sccache_action::commands::caches;
use sccache_action::commands::doctor;
use sccache_action::commands::rehearse::{self, Rehearsal};
use sccache_action::commands::stats;
use sccache_action::relay;
use sccache_action::runner::environment::Environment;
use sccache_action::runner::log::{Log, LogTarget, json_without_commands, without_commands};
#[cfg(feature = "serve")]
use sccache_action::serve::command;
use sccache_action::wrapper;

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    ignore_an_empty_tmpdir();
    let mut arguments = std::env::args_os();
    let argv0 = arguments.next().unwrap_or_default();
    if wrapper::is_wrapper(&argv0) {
        let arguments: Vec<OsString> = arguments.collect();
        let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from(argv0));
        return wrapper::run(&program, &arguments);
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return explain(&error),
    };
    match dispatch(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{}", without_commands(&format!("sccache-action: {error}")));
            // The status is not 1, which the launcher takes for a failure that the user wants to
            // see.
            ExitCode::from(3)
        }
    }
}

/// Without this, temporary files would be in the current directory, which is often the user's checkout.
fn ignore_an_empty_tmpdir() {
    if std::env::temp_dir().as_os_str().is_empty() {
        // It fails only if it was called before.
        let _ = tempfile::env::override_temp_dir(Path::new("/tmp"));
    }
}

/// Prints the help that was asked for, or what is wrong with the arguments. On a terminal, where no runner
/// reads it, with colours.
fn explain(error: &clap::Error) -> ExitCode {
    // If it cannot be printed, nobody reads it.
    let text = error.render().to_string();
    let _ = match error.use_stderr() {
        true if !io::stderr().is_terminal() => write!(io::stderr(), "{}", without_commands(&text)),
        false if !io::stdout().is_terminal() => print(&text),
        _ => error.print(),
    };
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

fn dispatch(command: Command) -> Result<ExitCode, Failure> {
    // The steps wait for one thing at a time; a second thread would only cost its start.
    let mut runtime = match command {
        Command::Setup
        | Command::Report
        | Command::Stats { .. }
        | Command::Caches(_)
        | Command::Doctor { .. } => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    // All processors may read contents, and one more thread answers meanwhile.
    #[cfg(feature = "serve")]
    if let Command::Serve(_) = command {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        runtime.worker_threads(processors + 1);
    }
    let runtime = runtime.enable_all().build()?;
    runtime.block_on(run(command))
}

async fn run(command: Command) -> Result<ExitCode, Failure> {
    let environment = Environment::of_this_process();
    let program = || std::env::current_exe();
    match command {
        Command::Setup => {
            let log = log(&environment);
            let outcome = setup::run_unless_cancelled(&environment, &program()?, &log).await;
            Ok(code(outcome == SetupOutcome::Done))
        }
        Command::Report => {
            let log = log(&environment);
            let outcome = report::run(&environment, &program()?, &log).await;
            Ok(code(outcome == ReportOutcome::Done))
        }
        Command::Relay => {
            let mut config = Vec::new();
            io::stdin().lock().read_until(b'\n', &mut config)?;
            relay::run(&config, io::stdout(), abandoned()).await?;
            Ok(ExitCode::SUCCESS)
        }
        #[cfg(feature = "serve")]
        Command::Serve(options) => {
            command::run(*options).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Stats { markdown, json } => print_stats(&environment, markdown, json).await,
        Command::Doctor { json } => {
            let findings = doctor::run_checks(&environment, &program()?).await;
            let text = if json {
                format!("{:#}\n", doctor::json(&findings))
            } else {
                doctor::text(&findings)
            };
            print_as(&text, json)?;
            Ok(code(doctor::is_ok(&findings)))
        }
        Command::Caches(command) => list_or_prune(&environment, &command).await,
        Command::Rehearse {
            sccache,
            mode,
            install_from,
            build,
        } => {
            let inputs = [
                ("INPUT_VERSION", sccache),
                ("INPUT_MODE", mode),
                ("INPUT_INSTALL-FROM", install_from),
            ];
            rehearse_jobs(environment, &program()?, inputs, build).await
        }
    }
}

/// The log of a step: commands for the runner where there is one.
fn log(environment: &Environment) -> Log {
    let is_set = |name, value| environment.get(name) == Some(value);
    let target = if is_set("GITHUB_ACTIONS", "true") {
        LogTarget::GitHubActions
    } else {
        LogTarget::Terminal
    };
    Log::new(io::stdout(), target, is_set("RUNNER_DEBUG", "1"))
}

fn code(is_success: bool) -> ExitCode {
    if is_success {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

async fn print_stats(
    environment: &Environment,
    markdown: bool,
    json: bool,
) -> Result<ExitCode, Failure> {
    let format = match (markdown, json) {
        (true, _) => stats::OutputFormat::Markdown,
        (false, true) => stats::OutputFormat::Json,
        (false, false) => stats::OutputFormat::Table,
    };
    let text = stats::run(environment, format).await?;
    print_as(&text, json && !markdown)?;
    Ok(ExitCode::SUCCESS)
}

async fn list_or_prune(
    environment: &Environment,
    command: &CachesCommand,
) -> Result<ExitCode, Failure> {
    match command {
        CachesCommand::List(options) => {
            print_as(&caches::list(environment, options).await?, options.json)?;
            Ok(ExitCode::SUCCESS)
        }
        CachesCommand::Prune(options) => {
            let pruned = caches::prune(environment, options).await?;
            print_as(&pruned.text, options.json)?;
            Ok(code(pruned.complete))
        }
    }
}

/// Runs a rehearsal with these inputs in place of the environment's.
async fn rehearse_jobs(
    mut environment: Environment,
    program: &Path,
    inputs: [(&str, Option<String>); 3],
    build: Vec<OsString>,
) -> Result<ExitCode, Failure> {
    for (input, value) in inputs {
        if let Some(value) = value {
            environment.set(input, value);
        }
    }
    let rehearsal = Rehearsal {
        program: program.to_owned(),
        environment,
        build,
    };
    let results = rehearse::run(&rehearsal).await?;
    for result in &results {
        print(&format!(
            "\n=== {} job: the summary\n\n{}\n",
            result.job, result.summary
        ))?;
    }
    print(&format!("{}\n", rehearse::table(&results)))?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the outcome of a command without text that a runner takes for a command. A reader that
/// closes the pipe early is no failure.
fn print(text: &str) -> io::Result<()> {
    print_all(&without_commands(text))
}

/// The same for JSON.
fn print_json(text: &str) -> io::Result<()> {
    print_all(&json_without_commands(text))
}

fn print_as(text: &str, is_json: bool) -> io::Result<()> {
    if is_json {
        print_json(text)
    } else {
        print(text)
    }
}

fn print_all(text: &str) -> io::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

/// Ends when standard input ends before it said that the relay is to live on.
async fn abandoned() {
    let (tell, told) = tokio::sync::oneshot::channel();
    // This needs a thread of its own, since a pending read keeps a runtime from ending.
    std::thread::spawn(move || {
        let is_untied = matches!(io::stdin().read(&mut [0]), Ok(1));
        let _ = tell.send(is_untied);
    });
    if told.await == Ok(true) {
        std::future::pending::<()>().await;
    }
}
