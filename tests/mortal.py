"""The training program, made to die: `python mortal.py WHERE N -- flags` ends it by SIGKILL, or fills its disk, at the N-th
time that it comes to WHERE:

    checkpoint   half of a checkpoint's bytes are in the temporary file
    rename       a checkpoint is whole, but has no name yet
    kept         a checkpoint has its name, nothing after that has happened
    cache        a chunk of the latent cache is written, but has no name yet
    full         from then on no byte can be written (ENOSPC)
"""

import errno
import io
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import safetensors.numpy
import torch

import train_align_with_args
import utils
from runtime.cli import run
from vaes.pipeline import PipelineWithVAEs

WHERE = ("checkpoint", "rename", "kept", "cache")


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def at(count, function, before=None, after=None):
    """`function`, with something before or after its `count`-th call."""
    calls = 0

    def counted(*args, **options):
        nonlocal calls
        calls += 1
        if calls == count and before:
            before(*args)
        result = function(*args, **options)
        if calls == count and after:
            after(*args)
        return result

    return counted


def half_a_checkpoint(content, file):
    whole = io.BytesIO()
    torch_save(content, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    die()


def main():
    where, count, argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    argv = argv[1:] if argv[0] == "--" else argv  # a launcher keeps it for itself
    if where == "checkpoint":
        torch.save = at(count, torch.save, before=half_a_checkpoint)
    elif where == "rename":
        torch.save = at(count, torch.save, after=die)
    elif where == "kept":
        pipeline = PipelineWithVAEs
        pipeline.save_checkpoint = at(count, pipeline.save_checkpoint, after=die)
    elif where == "cache":
        safetensors.numpy.save = at(count, safetensors.numpy.save, after=lambda *_: setattr(os, "fsync", die))
    elif where == "full":
        utils.os.fsync = at(count, os.fsync, before=disk_full)
    run(lambda: train_align_with_args.main(argv))


torch_save = torch.save
if __name__ == "__main__":
    main()
