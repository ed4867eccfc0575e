"""The training state, from which --resume continues a run with bit-identical results."""
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from checkpoint import check_history
from model import describe
from model.lora import merged
from option import shave_of
from system.errors import UserError
from system.state import check_like, load_optimizer

if TYPE_CHECKING:
    from trainer import Trainer


def identity_of(trainer: "Trainer") -> dict:
    """Return the properties that must be equal in a resumed run and the run that it continues."""
    first_test_set = next((f"{images.name}, {len(images)} images" for images in trainer.benchmarks
                           if any(pair.hr for pair in images.pairs)), None)  # its PSNR decides which model is the best
    return {"network": describe(trainer.student), "loss": "+".join(trainer.loss.names),
            "optimizer": trainer.args.optimizer, "first test set": first_test_set,
            "metrics": f"on {trainer.args.metric_space}, {shave_of(trainer.args)} pixels shaved"}


def state_of(trainer: "Trainer") -> dict:
    """Return the state of a `Trainer`: weights, optimisers, EMA, random number generators, history."""
    return dict(
        identity=identity_of(trainer), iteration=trainer.iteration, seconds=trainer.seconds, history=trainer.history,
        sums=trainer.sums, gradients=trainer.gradients,
        student=trainer.student.state_dict(), loss=trainer.loss.state_dict(), optimizer=trainer.optimizer.state_dict(),
        scaler=trainer.scaler.state_dict(), ema=trainer.ema.state_dict() if trainer.ema else None,
        random=torch.get_rng_state(),
        random_cuda=torch.cuda.get_rng_state(trainer.device) if trainer.device.type == "cuda" else None)


def load_state(trainer: "Trainer", state: dict, path: Path) -> None:
    """Load a state that `state_of` returned and that was read from `path`; settings are those of the resumed run's flags.

    Raises UserError where the state is of another run, damaged, or does not fit the flags.
    """
    own, args = state_of(trainer), trainer.args
    state = {"gradients": own["gradients"], **state}  # states of earlier versions have none
    try:
        before = {**own["identity"], **state["identity"]}
        for name, value in own["identity"].items():
            if before[name] != value:
                raise UserError(f"--resume 1: the run in {path.parent} is another one ({name}: {before[name]}, not "
                                f"{value}); resume it with its own flags, see its config.txt")
        for name in ("iteration", "student", "loss", "sums", "gradients", "random"):
            check_like(state[name], own[name], name)
        check_history(state["history"], trainer.loss.names, state["iteration"])
        trainer.student.load_state_dict(state["student"])
        trainer.loss.load_state_dict(state["loss"])
        if trainer.ema:
            ema = state["ema"]
            if ema is None:  # --ema was not given before
                ema = merged(trainer.student).state_dict()
            check_like(ema, own["ema"], "ema")
            trainer.ema.load_state_dict(ema)
        load_optimizer(trainer.optimizer, state["optimizer"])
        if state["scaler"] and trainer.scaler.is_enabled():
            check_like(state["scaler"], own["scaler"], "scaler")
            trainer.scaler.load_state_dict(state["scaler"])
        check_like(state.get("seconds", 0.0), own["seconds"], "seconds")
        trainer.seconds = state.get("seconds", 0.0)  # earlier versions did not save it
        trainer.sums.copy_(state["sums"])
        trainer.gradients.copy_(state["gradients"])
        trainer.iteration, trainer.history = state["iteration"], state["history"]
        torch.set_rng_state(state["random"])
        if trainer.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], trainer.device)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not the state of such a run ({reason}); resume it with its own flags, see its config.txt, "
                        "or start it anew with --reset") from None
    done, every = len(trainer.history), args.test_every
    if trainer.iteration > trainer.iterations or not done * every <= trainer.iteration <= (done + 1) * every:
        raise UserError(f"--resume 1: the run is at iteration {trainer.iteration} after {done} epochs, which does not fit "
                        f"--test_every {every} and --epochs {args.epochs}")
