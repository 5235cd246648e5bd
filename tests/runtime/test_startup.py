"""What a program says before its libraries are there."""

from conftest import run_script


def test_a_library_that_does_not_bear_the_environment_is_one_line():
    """A traceback for a variable that nobody foresaw; our modules not found by a Python that leaves out a script's folder."""
    env = {"TQDM_MININTERVAL": "often", "PYTHONSAFEPATH": "1"}
    ended = run_script("train_align_with_args.py", "--help", check=False, env=env)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and "ValueError" in ended.stderr and "'often'" in ended.stderr
