"""What stands around every script: its command line, its files, its checkpoints, how it ends.

A command line is made from a flat dataclass, one flag per field. Files are written under another
name and then renamed, so a reader finds the old one or the new one and never half of one. Of
several ranks, rank 0 writes.
"""
import argparse
import atexit
import contextlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
import typing
from dataclasses import fields

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save_file

from appendix import ranks
from appendix.files import DataError


# --------------------------------------------------------------------------------------------------
# how a script ends

def fail(message):
    """Print a message and exit with status 2. Unprintable characters are escaped, as in \\x1b."""
    shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)
    print(f"error: {shown}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def exit_on_error(out_of_memory="", interrupted="", saved=""):
    """Wrap main(): errors that the user can do something about end in one line and status 2.

    These are DataError, errors of a disk or a file, and, where their text is given, lack of memory
    and Ctrl-C. Any other error passes through.
    out_of_memory: the flags to change, most effective first. interrupted: what to say after Ctrl-C.
    saved: what is kept in spite of an error of a disk or a file, added to its message.
    """
    try:
        yield
    except DataError as e:
        fail(str(e))
    except (OSError, SafetensorError) as e:
        what = getattr(e, "filename", None)
        reason = getattr(e, "strerror", None) or one_line(e, 160)
        message = f"{what}: {reason}" if what else reason
        fail(f"{message}. {saved}" if saved else message)
    except RuntimeError as e:
        if not out_of_memory or not is_out_of_memory(e):
            raise
        fail(f"out of memory ({one_line(e, 160)}). Change, in this order: {out_of_memory}")
    except KeyboardInterrupt:
        if not interrupted:
            raise
        print(file=sys.stderr)                          # a progress bar may stand in this line
        fail(interrupted)


def is_out_of_memory(error):
    """torch has a class for GPU memory; for CPU memory only the message tells."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def one_line(error, length):
    """The message of an error without line breaks, at most `length` characters of it."""
    return " ".join(str(error).split())[:length]


class Interrupt:
    """Ctrl-C asks the run to stop after this step (`asked`); a second Ctrl-C stops it at once."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGINT, self.on_signal)

    def on_signal(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this step; Ctrl-C again to stop at once")


# --------------------------------------------------------------------------------------------------
# files

def read_json(path, *needed):
    """A JSON object that has the needed keys; anything else ends the program with one line."""
    try:
        with open(path, encoding="utf-8") as f:
            obj = json.load(f)
        missing = [key for key in needed if key not in obj]
    except (OSError, ValueError, TypeError) as e:
        fail(f"{path} cannot be read: {e}")
    if missing:
        fail(f"{path} has no {', '.join(map(repr, missing))}")
    return obj


def write_text(path, text):
    """Write a file atomically: a reader sees the old text or the new one. Rank 0 writes."""
    if ranks.rank() > 0:
        return
    tmp = path + ".tmp"
    with removed_on_error(tmp):
        # "replace": a model may write half a surrogate pair, which has no encoding.
        with open(tmp, "w", encoding="utf-8", errors="replace") as f:
            f.write(text)
        os.replace(tmp, path)


@contextlib.contextmanager
def removed_on_error(path):
    """Remove the half-written file or folder if what is done inside `with` fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.remove(path)
        raise


def write_json(path, obj):
    """Write an object as JSON, atomically. Rank 0 writes."""
    write_text(path, json.dumps(obj, indent=1))


def write_rows(path, rows):
    """Write a JSONL file, atomically. Rank 0 writes."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_rows(path, rows):
    """Add rows to a JSONL file. Rank 0 writes."""
    if ranks.rank() > 0:
        return
    with open(path, "a") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")


def keep_rows_before(path, step):
    """Cut a JSONL file down to the rows whose "step" is below `step`. Atomic; rank 0 writes.

    A last line that a crash left incomplete goes too. A file that is missing is created. A line
    without a step ends the program.
    """
    if ranks.rank() > 0:
        return
    kept = []
    if step > 0 and os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            for n, line in enumerate(f, 1):
                if line.endswith("\n") and step_of(line, f"{path}, line {n}") < step:
                    kept.append(line)
    write_text(path, "".join(kept))


def step_of(line, where):
    """The "step" of a line of metrics.jsonl or episodes.jsonl."""
    try:
        step = json.loads(line)["step"]
        if type(step) is int:
            return step
    except (ValueError, TypeError, KeyError):
        pass
    fail(f"{where} is {line.strip()!r:.60}; expected a row with a step. Remove that line to go on")


def cut_torn_line(path):
    """Remove what follows the last line break of a JSONL file: a line that a kill cut off."""
    with open(path, "rb+") as f:
        end = f.read().rfind(b"\n") + 1
        f.truncate(end)


def lock(folder):
    """Let no second program work in the folder until this one ends. Rank 0 locks.

    The file `lock` says who works there. If that process is on this machine and has ended, its
    lock is taken over; whether a process on another machine runs cannot be seen from here.
    """
    if ranks.rank() > 0:
        return
    path = os.path.join(folder, "lock")
    me = json.dumps({"process": os.getpid(), "host": socket.gethostname()})
    for _ in range(10):
        try:
            # O_EXCL: of two programs that come at the same moment one makes the file, one fails.
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            remove_stale_lock(path, folder)
            continue
        with open(handle, "w", encoding="utf-8") as f:
            f.write(me)
        atexit.register(unlock, path, os.getpid())
        return
    fail(f"other programs are about to work in {folder}; try again when they have ended")


def remove_stale_lock(path, folder):
    """Remove a lock whose process has ended; if it may still run, end this program."""
    text = text_of_lock(path)
    if text == "":
        time.sleep(0.1)                                 # the other program is just writing it
        text = text_of_lock(path)
    with contextlib.suppress(ValueError, TypeError, KeyError):
        owner = json.loads(text)
        process = owner["process"]
        host = owner["host"]
        if host != socket.gethostname() or is_running(process):
            fail(f"process {process} on {host} works in {folder}; wait for it, or name another "
                 f"folder. If it is gone, remove {path}")
    # Rename first: if another program has put its own lock there meanwhile, it gets that back.
    aside = f"{path}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if text_of_lock(aside) == text:
            os.remove(aside)
        else:
            os.rename(aside, path)


def text_of_lock(path):
    """What a lock says; "" if it is gone."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read()
    except FileNotFoundError:
        return ""


def refuse_to_overwrite(folder, results, fresh, go_on=""):
    """End the program if an earlier run left one of these results in the folder, unless `fresh`.

    go_on: how to continue that run, for the message.
    """
    there = [name for name in results if os.path.exists(os.path.join(folder, name))]
    if there and not fresh:
        fail(f"{folder} holds an earlier run ({', '.join(there)}); {go_on}take another --name, or "
             "overwrite it with --fresh")


def is_running(process):
    """Does another process of this number run on this machine?"""
    if type(process) is not int or process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:                                     # it runs, and is not ours
        pass
    return True


def unlock(path, process):
    if process == os.getpid():                          # not in a forked child
        with contextlib.suppress(OSError):
            os.remove(path)


def make_dir(path):
    """Make a folder, if it is missing, and check that files can be written into it -> path."""
    probe = os.path.join(path, f".writable.{os.getpid()}")
    try:
        os.makedirs(path, exist_ok=True)
        open(probe, "w").close()
        os.remove(probe)
    except OSError as e:
        fail(f"cannot write into {path}: {e.strerror}")
    return path


# --------------------------------------------------------------------------------------------------
# folders that are whole at any time

def replace_folder(tmp, folder):
    """Rename tmp to folder, so that a crash leaves the old one or the new one, never half of one.

    Between the two renames the old one is called folder.old, and `restore_folder` finds it.
    """
    old = folder.rstrip("/") + ".old"
    if os.path.exists(folder):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(tmp, folder)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(folder):
    """If a crash came between the two renames of `replace_folder`, give the old one its name back.

    Called before a folder is read again.
    """
    old = folder.rstrip("/") + ".old"
    if ranks.rank() == 0 and not os.path.exists(folder) and os.path.exists(old):
        os.rename(old, folder)
    ranks.barrier()


def save_checkpoint(folder, vlm, optimizer, state, weights_only=False):
    """Write all that a run needs to go on: weights, optimizer, random generator, and `state`.

    state is a dict for JSON: step, config, ... Rank 0 writes. With weights_only the optimizer and
    the generator are left out: the model can be used, but training cannot be resumed.
    """
    if ranks.rank() > 0:
        return
    with removed_on_error(folder + ".tmp"):
        tmp = vlm.save(folder)                          # into folder.tmp
        if not weights_only:
            tensors = {name: value.contiguous() for name, value in optimizer.tensors().items()}
            save_file(tensors, os.path.join(tmp, "optimizer.safetensors"))
            save_file({"torch": torch.get_rng_state()}, os.path.join(tmp, "rng.safetensors"))
        write_json(os.path.join(tmp, "state.json"), state)
        replace_folder(tmp, folder)


def load_checkpoint(folder, optimizer):
    """Restore the optimizer and the random generator -> state. The weights come with the model."""
    is_whole = os.path.exists(os.path.join(folder, "state.json"))
    if is_whole and not os.path.exists(os.path.join(folder, "optimizer.safetensors")):
        fail(f"{folder} holds weights only, so training cannot be resumed from it; "
             f"start another run from it with --model {folder}")
    try:
        optimizer.load_tensors(load_file(os.path.join(folder, "optimizer.safetensors")))
        rng = load_file(os.path.join(folder, "rng.safetensors"))
        torch.set_rng_state(rng["torch"])
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as f:
            return json.load(f)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as e:
        fail(f"{folder} is no checkpoint that training can resume from: {one_line(e, 200)}")


# --------------------------------------------------------------------------------------------------
# the command line

def parse_config(Config, argv=None, description="", presets=None, positive=()):
    """A flat dataclass -> its instance from the command line. Prints what differs from the default.

    Flags are the field names with dashes; the trailing comment of a field is its help; a flag that
    no field has is an error. No number may be negative or infinite.

    description: its first line heads the help. presets: a function config -> {field: value}, the
    defaults that depend on other flags. positive: names of the fields that must be above 0.
    """
    parser = make_parser(Config, description)
    config = Config(**vars(parser.parse_args(argv)))
    if presets:
        parser.set_defaults(**presets(config))
        config = Config(**vars(parser.parse_args(argv)))
    check_numbers(parser, config, positive)
    changed = []
    for f in fields(Config):
        value = getattr(config, f.name)
        if value != f.default:
            changed.append(f"{f.name} = {value!r}")
    print("settings: " + (", ".join(changed) or "all at their defaults"))
    return config


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line without the usage."""

    def error(self, message):
        fail(f"{message} (--help explains every flag)")


def make_parser(Config, description):
    """An argparse parser with one flag per field of a dataclass."""
    title = description.strip().split("\n")[0]
    parser = Parser(description=title, allow_abbrev=False)
    comments = field_comments(Config)
    for f in fields(Config):
        note = f"{comments.get(f.name, '')} (default: {f.default!r})"
        options = {"default": f.default, "help": note.replace("%", "%%")}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(f.type) is typing.Literal:
            options["choices"] = typing.get_args(f.type)
        else:
            options["type"] = f.type
        parser.add_argument(flag_of(f.name), **options)
    return parser


def field_comments(Config):
    """{field: its trailing comment}, read from the source of the class."""
    source = inspect.getsource(Config)
    return dict(re.findall(r"^    (\w+):[^#\n]*# (.*)$", source, re.MULTILINE))


def flag_of(name):
    return "--" + name.replace("_", "-")


def check_numbers(parser, config, positive):
    """Exit with an error if a number is negative, infinite, nan, or 0 where it must be above 0.

    The same for a --seed that is too large and a --name that names no folder.
    """
    for name, value in vars(config).items():
        if not isinstance(value, (int, float)):
            continue
        must_be_positive = name in positive
        allowed = 0 < value < math.inf if must_be_positive else 0 <= value < math.inf
        if not allowed:
            expected = "above 0" if must_be_positive else "of 0 or more"
            parser.error(f"{flag_of(name)} is {value}; expected a value {expected}")
    seed = getattr(config, "seed", 0)
    if seed >= 2 ** 32:
        parser.error(f"--seed is {seed}; expected a value below 2^32")
    if getattr(config, "name", "x") in ("", ".", ".."):
        parser.error(f"--name is {config.name!r}; expected the name of a folder in runs/")


def pick_fields(config, Dataclass):
    """An instance of Dataclass from the fields of config that have the same names."""
    names = [f.name for f in fields(config)]
    wanted = [f.name for f in fields(Dataclass)]
    shared = {name: getattr(config, name) for name in wanted if name in names}
    return Dataclass(**shared)
