"""Whether a file lies on a network file system, where SQLite's locks can't be relied on."""

from __future__ import annotations

from pathlib import Path

MOUNTS = Path("/proc/mounts")  # Linux; elsewhere nothing is found out

# From memory of Linux's names, and of FUSE's after "fuse.". SQLite's documentation ("How to corrupt an SQLite database file",
# 2.1) names network file systems in general.
NETWORK = {
    *("afs", "beegfs", "ceph", "cifs", "coda", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2"),
    *("orangefs", "panfs", "pvfs2", "rclone", "s3fs", "smb3", "smbfs", "sshfs"),
}


def network_file_system(path: Path, mounts: Path = MOUNTS) -> str | None:
    """The kind of network file system that a file is on, or would be; None for a local one, and where it can't be told.

    Args:
        path: absolute, without symbolic links.
        mounts: the kernel's table of mounts: device, mount point and kind, separated by spaces.
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    longest, kind = -1, ""
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(_unescaped(fields[1]))
        # Of two mounts at one point the later one hides the other.
        if path.is_relative_to(point) and len(point.parts) >= longest:
            longest, kind = len(point.parts), fields[2]
    return kind if kind.removeprefix("fuse.") in NETWORK else None


def _unescaped(field: str) -> str:
    """The kernel writes these four as octal numbers."""
    for character in " \t\n\\":
        field = field.replace(f"\\{ord(character):03o}", character)
    return field
