//! Checks that relative paths and the targets of links stay inside their folder.

use std::path::{Component, Path};

use crate::cargo_cache::files::ExtractError;

/// A relative path with `/` between its components.
pub(in crate::cargo_cache) fn relative_name(path: &Path) -> Option<String> {
    let names: Option<Vec<&str>> = path
        .components()
        .map(|component| match component {
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
        .collect();
    Some(names?.join("/"))
}

/// Whether a path stays in the folder that it is relative to.
pub(crate) fn is_inside(path: &str) -> bool {
    let names = path.split('/');
    !path.is_empty()
        && names.clone().all(|name| !name.is_empty() && name != "." && name != "..")
        // It has no drive or other separators either, on systems that have them.
        && relative_name(Path::new(path)).is_some_and(|name| name == path)
}

/// Refuses the target of a symbolic link at `path` that leads outside of the part's root.
pub(super) fn stays_inside(path: &str, target: &str) -> Result<(), ExtractError> {
    let mut depth = path.split('/').count().saturating_sub(1);
    let mut goes_down = false;
    for name in target.split('/') {
        let stays = match name {
            "" | "." => !target.starts_with('/'),
            // `..` behind a name would lead up from the target of that name if it is a link.
            ".." if goes_down => false,
            ".." => depth.checked_sub(1).map(|less| depth = less).is_some(),
            _ => {
                goes_down = true;
                true
            }
        };
        if !stays {
            return Err(ExtractError::UnsafePath(target.to_owned()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::cargo_cache::files::fixtures::{extract, part, source};
    use crate::cargo_cache::manifest::FileKind;

    #[test]
    fn nothing_is_written_outside_of_the_folder() {
        let source = source();
        let (good, content) = part(source.path(), &["deps/file"], None);
        let target = tempfile::tempdir().unwrap();
        let root = target.path().join("root");
        fs::create_dir(&root).unwrap();
        for path in ["../file", "/file", "a/../../file", "", ".", "a//b", "./a"] {
            let mut part = good.clone();
            part.entries[0].path = path.to_owned();
            let refused = extract(&root, &part, &content);
            assert!(
                matches!(refused, Err(ExtractError::UnsafePath(_))),
                "{path}"
            );
            let mut part = good.clone();
            part.commit_marker = Some(path.to_owned());
            let refused = extract(&root, &part, &content);
            assert!(
                matches!(refused, Err(ExtractError::UnsafePath(_))),
                "{path}"
            );
        }
        for link in ["/etc/passwd", "../x", "a/../../x"] {
            let mut part = good.clone();
            part.entries[0].kind = FileKind::Symlink(link.to_owned());
            part.entries[0].path = "link".to_owned();
            let refused = extract(&root, &part, &content);
            assert!(
                matches!(refused, Err(ExtractError::UnsafePath(_))),
                "{link}"
            );
        }
        let outside: Vec<_> = fs::read_dir(target.path()).unwrap().collect();
        assert_eq!(outside.len(), 1);
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    }

    #[cfg(unix)]
    #[test]
    fn no_chain_of_links_leads_out_of_the_folder() {
        use crate::cargo_cache::manifest::{CachePart, FileEntry};
        let source = source();
        let (good, content) = part(source.path(), &["deps/file"], None);
        let file = good.entries[0].clone();
        let entry = |path: &str, kind: FileKind| FileEntry {
            path: path.to_owned(),
            kind,
            modified: file.modified,
        };
        let link = |path: &str, target: &str| entry(path, FileKind::Symlink(target.to_owned()));
        let chain = vec![
            entry("a/b/c", FileKind::Folder),
            entry("f", file.kind.clone()),
            link("a/b/c/l1", "../../.."),
            link("a/b/c/l2", "l1/.."),
            entry("a/b/c/l2/ESCAPED", FileKind::Link(1)),
        ];
        let through = vec![
            entry("f", file.kind.clone()),
            link("l", "a"),
            entry("l/ESCAPED", FileKind::Link(0)),
        ];
        for entries in [chain, through] {
            let target = tempfile::tempdir().unwrap();
            let root = target.path().join("root");
            fs::create_dir(&root).unwrap();
            let part = CachePart {
                entries,
                ..good.clone()
            };
            let _ = extract(&root, &part, &content);
            let outside: Vec<_> = fs::read_dir(target.path()).unwrap().collect();
            assert_eq!(outside.len(), 1);
        }
    }
}
