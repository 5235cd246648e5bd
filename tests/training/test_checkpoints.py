"""Which files a run keeps and deletes beside its checkpoints."""

import os

from training.checkpoints import drop_abandoned


def test_half_written_checkpoints_do_not_pile_up(tmp_path):
    """A disk that kills fill up; a file deleted under a run that is writing it; another file's deletion."""
    names = (".align_pipeline_20260101_000000.pth.x.tmp", ".align_best_20260101_000000.pth.x.tmp", "my.tmp", "align_x.pth")
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".align_pipeline_20260101_000001.pth.y.tmp").touch()
    drop_abandoned(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {*names[2:], ".align_pipeline_20260101_000001.pth.y.tmp"}
    drop_abandoned(tmp_path / "nowhere")
