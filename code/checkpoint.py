"""The folder of a run, experiment/<ckp_dir>/: files that appear whole or not at all, logs, curves."""
import csv
import io
import logging

import torch

from model import save_header
from model.loading import CheckpointError
from option import ROOT
from system.errors import UserError, is_rank_zero
from system.files import atomic_save, atomic_write, lock
from system.logger import log_to

log = logging.getLogger("sr")
OWN_FILES = "state.pt", "config.txt", "log.txt", "metrics.csv", "loss.csv", "loss_*.png", "psnr_*.png", "model/model_*.pt"
NOT_OF_THE_RUN = "given", "resume", "reset"  # flags that say nothing about what is computed


def save_model(net, path):
    """Saves the weights with the header from which `load_model` builds the network; of a channel slice the whole network."""
    net = getattr(net, "full_network", net)
    atomic_save({**save_header(net), "params": net.state_dict()}, path)


class Experiment:
    """The folder of one run. `state` is what an earlier part of it saved to go on from, else None.

    Nothing is written before `begin`, so that a run that cannot start leaves the folder as it was.
    """

    def __init__(self, args):
        self.folder = ROOT / "experiment" / args.ckp_dir
        self.args, self.lock = args, None
        old = self.folder / "state.pt"
        if args.resume and not old.exists():
            raise UserError(f"--resume 1: {old} is not there; start the run without it, or name its folder with --ckp_dir")
        if old.exists() and not args.resume and not args.reset:
            raise UserError(f"{self.folder} already holds a run: --resume 1 continues it, --reset replaces it, another "
                            "--ckp_dir leaves it alone")
        self.state = self._load(old) if args.resume else None

    def begin(self):
        """Takes the folder: makes it, locks it against a second run, removes what --reset replaces, starts the log."""
        if not is_rank_zero():
            return
        try:
            (self.folder / "model").mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder / ".lock", f"{self.folder}: another run is writing there; wait for it, or give "
                             "another --ckp_dir")
            if self.args.reset:
                for pattern in OWN_FILES:
                    for file in self.folder.glob(pattern):
                        file.unlink()
            log_to(self.folder / "log.txt")
        except OSError as error:
            raise UserError(f"{error.filename or self.folder}: cannot write there ({error.strerror}); give another --ckp_dir"
                            ) from None
        self._write_config()

    def end(self):
        """Gives the folder free for other runs."""
        if self.lock:
            self.lock.close()

    def _load(self, path):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a broken file makes the reader raise
            raise CheckpointError(f"{path}: broken ({str(error).splitlines()[0]}); --reset starts the run anew") from None

    def _write_config(self):
        config = {name: value for name, value in sorted(vars(self.args).items()) if name not in NOT_OF_THE_RUN}
        text = "".join(f"{name}: {value}\n" for name, value in config.items())
        path = self.folder / "config.txt"
        if self.args.resume and path.exists():
            before = dict(line.split(": ", 1) for line in path.read_text(encoding="utf-8").splitlines() if ": " in line)
            for name, value in config.items():
                if name in before and before[name] != str(value):
                    log.info("continues with --%s %s (was %s)", name, value, before[name])
        atomic_write(path, text.encode())

    def save_state(self, state):
        atomic_save(state, self.folder / "state.pt")

    def save_models(self, net, is_best, epoch):
        names = ["model_latest.pt"] + ["model_best.pt"] * is_best + [f"model_{epoch}.pt"] * self.args.save_models
        for name in names:
            self.save_model(net, name)

    def save_model(self, net, name):
        save_model(net, self.folder / "model" / name)

    def write_history(self, history):
        """history: a dict an epoch -> metrics.csv, loss.csv and the curves."""
        scores = [dict(epoch=row["epoch"], iteration=row["iteration"], dataset=name, scale=self.args.scale,
                       psnr=f"{psnr:.4f}", ssim=f"{ssim:.5f}")
                  for row in history for name, (psnr, ssim) in row["scores"].items()]
        losses = [dict(epoch=row["epoch"], iteration=row["iteration"], lr=f"{row['lr']:.4g}",
                       **{name: f"{value:.6g}" for name, value in with_total(row["loss"]).items()}) for row in history]
        for name, rows in (("metrics.csv", scores), ("loss.csv", losses)):
            if rows:
                text = io.StringIO()
                writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
                atomic_write(self.folder / name, text.getvalue().encode())
        self._plot(history)

    def _plot(self, history):
        curves = {}
        for row in history:
            points = {(f"loss_{name}", f"{name}, weighted"): value for name, value in with_total(row["loss"]).items()}
            points |= {(f"psnr_{name}", f"PSNR (dB) on {name} x{self.args.scale}"): psnr
                       for name, (psnr, _) in row["scores"].items()}
            for curve, value in points.items():
                curves.setdefault(curve, []).append((row["epoch"], value))
        for (name, label), points in curves.items():
            atomic_write(self.folder / f"{name}.png", draw_curve(points, label))


def with_total(losses):
    return {"total": sum(losses.values()), **losses}


def draw_curve(points, label):
    """[(epoch, value)] -> PNG bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - takes half a second, at the end of an epoch
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points), marker="o" if len(points) < 30 else None, markersize=3)
    axes.set(xlabel="epoch", ylabel=label)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
