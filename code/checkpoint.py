"""The folder of a run, experiment/<ckp_dir>/: checkpoints, training state, logs and curves, each written atomically."""
import csv
import io
import logging
import math
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import nn

import config
import evaluation
from model import save_header
from option import ROOT, make_parser
from plotting import to_png
from system.errors import UserError, is_rank_zero, reason_of
from system.files import atomic_save, atomic_write, load_torch_file, lock, remove_stale_parts
from system.logger import log_to

log = logging.getLogger("sr")
# and model/*.pt, and a curve for each column of loss.csv and each test set of metrics.csv
RESULTS = "state.pt", "metrics.csv", "images.csv", "loss.csv", "time.csv"
OPTIONAL = {"gradients", "images", "perceptual", "seconds", "total"}  # entries of the history that not every epoch has
MODEL = re.compile(r"model_(best|latest|raw|[0-9]+)\.pt")
EVENTS = "events.out.tfevents.*"  # files of TensorBoard
REPLACED = ".replaced"  # where --reset keeps the old run until the new one has saved a state


def save_model(net: nn.Module, path: Path | str) -> None:
    """Save the weights with the header from which `load_model` builds the network; for a channel slice, the full network."""
    net = getattr(net, "full_network", net)
    atomic_save({**save_header(net), "params": net.state_dict()}, path)


@contextmanager
def accessing(folder: Path) -> Iterator[None]:
    """Turn an OSError raised in the body into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        path = error.filename or folder
        raise UserError(f"{path}: cannot read or write ({reason_of(error)}); give another --ckp_dir") from None


class Experiment:
    """The folder of one run. `state` is the saved training state where the run is resumed, else None.

    Nothing is written before `begin`, so that a run that cannot start leaves the folder as it was. The constructor locks a
    folder that has been used before. A new one is locked in `begin`, which compares its files with those that the
    constructor found, since loading the data in between may take minutes.
    """

    def __init__(self, args: Namespace):
        self.folder = ROOT / "experiment" / args.ckp_dir
        self.args, self.lock, self.state, self.moved = args, None, None, False
        try:
            self._open()
        except UserError:
            self.end()
            raise

    def _open(self):
        args, state = self.args, self.folder / "state.pt"
        with accessing(self.folder):
            if is_rank_zero():
                check_place(self.folder)
                if (self.folder / ".lock").exists():
                    self._lock()
                self.found = self._find()
                self._check_free()
            if args.resume == 1 and not os.path.lexists(state):
                raise UserError(f"--resume 1: {state} does not exist; start the run without --resume, or give its folder "
                                "with --ckp_dir")
            self.resumes = args.resume == 1 or (args.resume == "auto" and os.path.lexists(state))
            if self.resumes:
                self.state = load_state_file(state)

    def begin(self) -> None:
        """Make and lock the folder, move aside the files that --reset replaces, write config.txt, start the log file."""
        if not is_rank_zero():
            return
        with accessing(self.folder):
            (self.folder / "model").mkdir(parents=True, exist_ok=True)
            if not self.lock:
                self._lock()
            if self._find() != self.found:
                raise UserError(f"{self.folder}: another run wrote there while this one was prepared; give another "
                                "--ckp_dir")
            for folder in (self.folder, self.folder / "model", *self.folder.glob("results-*")):
                remove_stale_parts(folder)
            if self.args.reset:
                self._move_aside()
            changes = self._write_config()
            log_to(self.folder / "log.txt")
        for flag, value, before in changes:
            log.info("continues with %s %s (was %s)", flag, value, before)

    def end(self) -> None:
        """Unlock the folder; if the new run saved nothing, restore the one that --reset was to replace first."""
        if self.moved:
            self._restore()
        if self.lock:
            self.lock.close()
            self.lock = None

    def _lock(self):
        self.lock = lock(self.folder / ".lock", f"{self.folder}: another run is writing there; wait for it, or give another "
                         "--ckp_dir")

    def _find(self):
        """Return {file: (inode, size, time)} of the files of a run in the folder, without other files of the user."""
        names = [*RESULTS, "config.txt", "log.txt", *curves_of(self.folder)]
        models = self.folder / "model"
        names += [f"model/{name}" for name in (os.listdir(models) if models.is_dir() else ()) if MODEL.fullmatch(name)]
        paths = [self.folder / name for name in names] + sorted((self.folder / "tensorboard").glob(EVENTS))
        stats = {path: os.lstat(path) for path in paths if os.path.lexists(path)}
        return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

    def _check_free(self):
        """Raise UserError where the run would overwrite another one, or --reset would remove files of no run.

        A folder with no more than config.txt, log.txt and events of TensorBoard is of a run that saved nothing: the first
        two are replaced, the events hidden.
        """
        if (self.folder / REPLACED).is_dir() and not self.args.reset:
            raise UserError(f"{self.folder / REPLACED} holds a run that --reset was replacing when it was killed; move its "
                            f"files back to {self.folder}, or repeat --reset")
        of_a_run = self.folder / "state.pt" in self.found or is_config(self.folder / "config.txt")
        began = {path for path in self.found if path.name in ("config.txt", "log.txt") or path.match(EVENTS)}
        results = self.found.keys() - (began if of_a_run else set())
        if not results or (self.args.resume and self.folder / "state.pt" in self.found):
            return
        first = min(results).relative_to(self.folder)
        if not of_a_run:
            raise UserError(f"{self.folder} holds {first}, which a run would overwrite, but no run (config.txt, state.pt); "
                            "move it elsewhere, or give another --ckp_dir")
        if not self.args.reset and self.args.resume != 1:
            go_on = "--resume 1 continues it, " if self.folder / "state.pt" in self.found else ""
            raise UserError(f"{self.folder} already holds a run ({first}): {go_on}--reset replaces it, another --ckp_dir "
                            "leaves it alone")

    def _move_aside(self):
        aside, self.moved = self.folder / REPLACED, True
        for folder in ("model", "tensorboard"):
            (aside / folder).mkdir(parents=True, exist_ok=True)
        for path in self.found:
            if os.path.lexists(aside / path.relative_to(self.folder)):  # moved by an earlier --reset, which was killed
                path.unlink()
            else:
                path.rename(aside / path.relative_to(self.folder))

    def _restore(self):
        """Move back the files that --reset had moved aside."""
        aside = self.folder / REPLACED
        with suppress(OSError):
            for path in (self.folder / "tensorboard").glob(EVENTS):  # of the new run
                path.unlink()
            for path in [path for path in aside.rglob("*") if not path.is_dir()]:
                path.replace(self.folder / path.relative_to(aside))
            shutil.rmtree(aside)

    def _write_config(self):
        """Write config.txt; return the flags that differ from those of the run that is resumed."""
        path = self.folder / "config.txt"
        text = config.to_text(self.args, make_parser()._actions)
        before = read_text(path) if self.resumes and os.path.lexists(path) else text
        atomic_write(path, text.encode(errors="surrogateescape"))
        return config.differences(before, text)

    def save_state(self, state: dict) -> None:
        """Save the training state; from then on the run that --reset replaces is deleted."""
        atomic_save(state, self.folder / "state.pt")
        if self.moved:
            shutil.rmtree(self.folder / REPLACED, ignore_errors=True)
            self.moved = False

    def save_models(self, net: nn.Module, is_best: bool, epoch: int) -> None:
        """Save model_latest.pt, model_best.pt if `is_best`, and with --save_models also model_<epoch>.pt."""
        names = ["model_latest.pt"] + ["model_best.pt"] * is_best + [f"model_{epoch}.pt"] * self.args.save_models
        for name in names:
            self.save_model(net, name)

    def save_model(self, net: nn.Module, name: str) -> None:
        """Save the network in the folder model/ under that file name."""
        save_model(net, self.folder / "model" / name)

    def write_history(self, history: list[dict]) -> None:
        """Write metrics.csv, images.csv, loss.csv, time.csv and the curves.

        history: a dict for each epoch, as `Trainer.test_epoch` records it.
        """
        models = {"model_best.pt": evaluation.best_epoch(history), "model_latest.pt": history[-1]["epoch"]}
        images = [image for name, epoch in models.items() for row in history if row["epoch"] == epoch
                  for image in evaluation.image_rows(name, epoch, self.args.scale, row.get("images", {}))]
        scores = [dict(epoch=row["epoch"], iteration=row["iteration"], dataset=name, scale=self.args.scale,
                       psnr=f"{psnr:.4f}", ssim=f"{ssim:.5f}",
                       **{metric: f"{value:.5f}" for metric, value in row.get("perceptual", {}).get(name, {}).items()})
                  for row in history for name, (psnr, ssim) in row["scores"].items()]
        losses = [dict(epoch=row["epoch"], iteration=row["iteration"], lr=f"{row['lr']:.4g}",
                       **{name: f"{value:.6g}" for name, value in with_total(row).items()},
                       **{f"{name}_gradient": f"{norm:.6g}" for name, norm in row.get("gradients", {}).items()})
                  for row in history]
        times = [dict(epoch=row["epoch"], iteration=row["iteration"], seconds=f"{row['seconds']:.2f}")
                 for row in history if "seconds" in row]
        for name, rows in (("metrics.csv", scores), ("images.csv", images), ("loss.csv", losses), ("time.csv", times)):
            if rows:
                write_table(self.folder / name, rows)
        self._plot(history)

    def _plot(self, history):
        curves = {}
        for row in history:
            points = {(f"loss_{name}", f"{name}, weighted"): value for name, value in with_total(row).items()}
            points |= {(f"loss_{name}_gradient", f"gradient norm of {name}, weighted"): norm
                       for name, norm in row.get("gradients", {}).items()}
            points |= {(f"psnr_{name}", f"PSNR (dB) on {name} x{self.args.scale}"): psnr
                       for name, (psnr, _) in row["scores"].items()}
            for curve, value in points.items():
                curves.setdefault(curve, []).append((row["epoch"], value))
        for (name, label), points in curves.items():
            atomic_write(self.folder / f"{name}.png", draw_curve(points, label))


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows to a CSV file whose columns are all their keys; a row without a key has an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode(errors="surrogateescape"))


def check_place(folder: Path) -> None:
    """Raise UserError or OSError where the folder cannot be made or written to, before anything slow is done."""
    if max(len(os.fsencode(part)) for part in folder.parts) > 255 or len(os.fsencode(folder)) > 3900:
        raise UserError(f"--ckp_dir {folder.name[:40]}...: longer than file systems allow; give a shorter name")
    place = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not place.is_dir():
        raise UserError(f"{place}: a file, not a folder; give another --ckp_dir")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place}: its permissions do not allow writing; give another --ckp_dir")


def read_text(path: Path) -> str:
    """Return the text of a file, with bytes that are no UTF-8 as surrogate escapes."""
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def is_config(path: Path) -> bool:
    """Return whether the file is the config.txt of a run, of this version or an earlier one."""
    return path.is_file() and read_text(path).startswith((config.HEADER, "G0: "))  # "G0: ": of earlier versions


def curves_of(folder: Path) -> list[str]:
    """Return the file names of a run's curves: one for each column of loss.csv and each test set of metrics.csv."""
    tables = {}
    for name in ("loss.csv", "metrics.csv"):
        tables[name] = []
        if (folder / name).is_file():
            with suppress(csv.Error):
                tables[name] = list(csv.DictReader(io.StringIO(read_text(folder / name))))
    names = [f"loss_{column}.png" for column in (tables["loss.csv"] or [{}])[0]]
    names += [f"psnr_{row.get('dataset')}.png" for row in tables["metrics.csv"]]
    return sorted({name for name in names if name == Path(name).name})


def load_state_file(path: Path) -> dict:
    """Return the training state that `save_state` wrote; raises UserError, or OSError where the file cannot be opened."""
    with path.open("rb"):
        pass
    try:
        state = load_torch_file(path)
    except UserError as error:
        raise UserError(f"{error}; --reset starts the run anew") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not the state of a run; --reset starts the run anew")
    return state


def check_history(history: object, terms: Iterable[str], iteration: int) -> None:
    """Raise ValueError unless `history` is a list of dicts as `Trainer.test_epoch` appends them, for these loss terms."""
    if not isinstance(history, list):
        raise ValueError(f"history is of type {type(history).__name__}, not list")
    last = 0
    for epoch, row in enumerate(history, 1):
        if not isinstance(row, dict) or row.keys() - OPTIONAL != {"epoch", "iteration", "lr", "loss", "scores"}:
            raise ValueError(f"history has an odd entry {epoch}")
        losses, gradients, images = with_total(row), row.get("gradients", {}), row.get("images", {})
        perceptual = [value for values in row.get("perceptual", {}).values() for value in values.values()]
        scores = [*row["scores"].values(), *(pair for per_image in images.values() for _, *pair in per_image)]
        numbers = [row["lr"], row.get("seconds", 0.0), *losses.values(), *gradients.values(), *perceptual,
                   *(value for pair in scores for value in pair)]
        counted = row["epoch"] == epoch and type(row["iteration"]) is int and last < row["iteration"] <= iteration
        named = (row["loss"] and all(list(found) == [name for name in terms if name in found]  # others are of other stages
                                     for found in (row["loss"], gradients))
                 and images.keys() <= row["scores"].keys() and all(name == Path(name).name for name in row["scores"])
                 and all(type(name) is str for per_image in images.values() for name, *_ in per_image))
        if not counted or not named or any(len(pair) != 2 for pair in scores):
            raise ValueError(f"history has an odd entry {epoch}")
        if not all(isinstance(value, float) for value in numbers) or not all(
                map(math.isfinite, (*losses.values(), *gradients.values()))):
            raise ValueError(f"history has odd numbers in entry {epoch}")
        last = row["iteration"]


def with_total(row: dict) -> dict[str, float]:
    """Return the loss terms of an epoch of the history, with the loss, `total`, in front, which older states lack."""
    return {"total": row.get("total", sum(row["loss"].values())), **row["loss"]}


def draw_curve(points: list[tuple[int, float]], label: str) -> bytes:
    """Plot (epoch, value) points, and return a PNG file."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes half a second, at the end of an epoch

    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points), marker="o" if len(points) < 30 else None, markersize=3)
    axes.set(xlabel="epoch", ylabel=label)
    axes.grid(alpha=0.3)
    return to_png(figure)
