"""Opening what keeps studies: several at once on a new file, and files on network file systems."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import optuna
import pytest

from bayesnn import BayesnnWarning
from bayesnn.bo.file_systems import network_file_system
from bayesnn.bo.storage import open_storage

MOUNTS = """\
/dev/sda1 / ext4 rw,relatime 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/local xfs rw 0 0
//server/share /mnt/with\\040space cifs rw 0 0
me@host: /mnt/ssh fuse.sshfs rw 0 0
host@tcp:/fs /scratch lustre rw 0 0
tmpfs /scratch tmpfs rw 0 0
none /home/also nfs rw 0 0
"""


@pytest.mark.parametrize(
    "path, kind",
    [
        ("/study.db", None),
        ("/home/me/study.db", "nfs4"),
        ("/homes/study.db", None),
        ("/home/local/study.db", None),
        ("/home/also/deep/down/study.db", "nfs"),
        ("/mnt/with space/study.db", "cifs"),
        ("/mnt/ssh/study.db", "fuse.sshfs"),
        ("/scratch/study.db", None),  # hidden by what was mounted later
    ],
)
def test_which_file_system(tmp_path: Path, path: str, kind: str | None) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    assert network_file_system(Path(path), tmp_path / "mounts") == kind
    assert network_file_system(Path(path), tmp_path / "nothing") is None
    (tmp_path / "mounts").write_text("one two\n\n")
    assert network_file_system(Path(path), tmp_path / "mounts") is None


@pytest.mark.parametrize("form", ["{}", "sqlite:///{}"])
def test_a_file_on_a_network_file_system_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    far, near = tmp_path / "far", tmp_path / "near"
    far.mkdir()
    near.mkdir()
    (near / "link").symlink_to(far)
    (tmp_path / "mounts").write_text(f"x / ext4 rw 0 0\nhost:/ {far.resolve()} nfs rw 0 0\n")
    monkeypatch.setattr("bayesnn.bo.file_systems.network_file_system.__defaults__", (tmp_path / "mounts",))
    for path in (far / "study.db", near / "link" / "study.db"):
        with pytest.warns(BayesnnWarning, match=r"network file system \(nfs\).* put the file on a local disk, or give"):
            open_storage(form.format(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", BayesnnWarning)
        open_storage(form.format(near / "study.db"))
        open_storage("sqlite://")


def test_several_open_a_new_file_at_once(tmp_path: Path) -> None:
    """Each would make the tables; Optuna by itself lets all but one or two of them fail."""
    together = Barrier(6)

    def begin(_: int) -> str:
        together.wait()
        storage = open_storage(tmp_path / "study.db")
        return optuna.create_study(study_name="s", storage=storage, load_if_exists=True).study_name

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(begin, range(6))) == ["s"] * 6
    assert optuna.get_all_study_names(open_storage(tmp_path / "study.db")) == ["s"]


def test_a_driver_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(ValueError, match=r'its driver comes with pip install "bayesnn\[postgresql\]"'):
        open_storage("postgresql+psycopg://host/studies")
