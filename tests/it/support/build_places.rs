//! The ways to tell cargo where and how to build, from configurations and steps that people have. The tests of
//! the cargo cache and a benchmark go through all of them.

/// A way to choose cargo's build directory.
#[derive(Clone, Copy, Debug)]
pub struct BuildPlace {
    /// What people know it by.
    pub name: &'static str,
    /// Additional lines of the workspace's configuration.
    pub config: &'static str,
    /// A variable of the whole job.
    pub variable: Option<(&'static str, &'static str)>,
    /// The words before `cargo` in the step.
    pub before: &'static str,
    /// The words behind its command.
    pub behind: &'static str,
}

/// The folder `target` of the workspace.
pub const PLAIN: BuildPlace = BuildPlace {
    name: "plain",
    config: "",
    variable: None,
    before: "",
    behind: "",
};

/// The others.
pub const BUILD_PLACES: [BuildPlace; 9] = [
    BuildPlace {
        name: "build.target-dir",
        config: "[build]\ntarget-dir = \"out\"\n",
        ..PLAIN
    },
    BuildPlace {
        name: "build.build-dir",
        config: "[build]\nbuild-dir = \"{cargo-cache-home}/build/{workspace-path-hash}\"\n",
        ..PLAIN
    },
    BuildPlace {
        name: "CARGO_BUILD_BUILD_DIR",
        variable: Some(("CARGO_BUILD_BUILD_DIR", "build-of-the-job")),
        ..PLAIN
    },
    BuildPlace {
        name: "CARGO_TARGET_DIR of the job",
        variable: Some(("CARGO_TARGET_DIR", "target-of-the-job")),
        ..PLAIN
    },
    BuildPlace {
        name: "CARGO_TARGET_DIR of a step",
        before: "CARGO_TARGET_DIR=$PWD/elsewhere",
        ..PLAIN
    },
    BuildPlace {
        name: "the runner's temporary folder",
        before: "CARGO_TARGET_DIR=$RUNNER_TEMP/target",
        ..PLAIN
    },
    BuildPlace {
        name: "a target",
        behind: "--target $(rustc --print host-tuple)",
        ..PLAIN
    },
    BuildPlace {
        name: "a tool's folder, a target",
        behind: "--target-dir target/llvm-cov-target --target $(rustc --print host-tuple)",
        ..PLAIN
    },
    BuildPlace {
        name: "release",
        behind: "--release",
        ..PLAIN
    },
];
