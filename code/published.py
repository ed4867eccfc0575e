"""The published experiments of published.csv: their settings as flags, their scores, their scripts. Imports no torch.

A row has a script where the training was published with its settings; of the others, such as those that a paper quotes,
there are only scores. The columns from `student` to `self_ensemble` are flags, where yes is a flag without a value, but for
`student`, a preset of a network's sizes, and `image_range`, the largest value of a pixel for which the weights of the loss
were published. `pre_train` names the experiment whose finished student this one starts from.

`python published.py` writes the scripts and the table in scripts/README.md anew.
"""
import csv
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from system.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = "Set5", "Set14", "B100", "Urban100"  # scored on Y without the border, as here
RESTORATION = "GoPro", "Test100", "Rain100H", "Rain100L", "Test2800", "Test1200"  # scored whole, GoPro on RGB
BEGIN, END = "<!-- published.csv -->\n", "<!-- end of published.csv -->\n"


class Experiment(NamedTuple):
    """A row of published.csv: `flags` and `scores` {data set: (PSNR, SSIM)} hold the cells that are not empty, as text."""

    name: str
    paper: str
    script: str
    flags: dict[str, str]
    scores: dict[str, tuple[str, str]]
    settings_source: str
    settings_certainty: str
    note: str

    @property
    def ckp_dir(self) -> str:
        """Return the folder of the run below experiment/, if --ckp_dir names no other."""
        return f"published/{self.name.replace('/', '_')}"


@lru_cache
def experiments() -> dict[str, Experiment]:
    """Read all published experiments, by name."""
    with Path(__file__).with_name("published.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0])
    flags = columns[columns.index("student"):columns.index("self_ensemble") + 1]
    datasets = [column.removesuffix("_psnr") for column in columns if column.endswith("_psnr")]
    return {row["name"]: Experiment(
        flags={flag: row[flag] for flag in flags if row[flag]},
        scores={name: (row[f"{name}_psnr"], row[f"{name}_ssim"]) for name in datasets if row[f"{name}_psnr"]},
        **{field: row[field] for field in Experiment._fields if field in row}) for row in rows}


def find_training(name: str) -> Experiment:
    """Return the experiment of that name; raises ValueError where there is none, or only scores of it were published."""
    found = experiments().get(name)
    if not found:
        raise ValueError(f"--published {name}: no such experiment; --published list shows all")
    if not found.script:
        reason = found.note or found.settings_certainty
        raise ValueError(f"--published {name}: its scores alone are known, not its settings ({reason})")
    return found


def preset(name: str, sizes: Mapping[str, dict]) -> dict:
    """Return the flags of an experiment: student, teacher, training, test protocol and folder.

    sizes: the presets of the networks' sizes. Raises ValueError as `find_training`.
    """
    experiment = find_training(name)
    flags = {flag: True if value == "yes" else value for flag, value in experiment.flags.items() if flag != "student"}
    if "pre_train" in flags:
        flags["pre_train"] = str(ROOT / "experiment" / experiments()[flags["pre_train"]].ckp_dir / "model/model_latest.pt")
    return {**sizes[experiment.flags["student"]], **flags, "ckp_dir": experiment.ckp_dir}


def training_preset(name: str) -> dict:
    """Return the flags of an experiment's training alone, for any student, teacher, scale and test."""
    others = "student", "teacher", "scale", "patch_size", "pre_train", "self_ensemble"
    return {flag: value for flag, value in find_training(name).flags.items() if flag not in others}


def require_start(args) -> None:
    """Raise UserError where the finished student that the experiment starts from is not there."""
    if args.published and "pre_train" not in args.given and args.pre_train and not Path(args.pre_train).exists():
        first = experiments()[args.published].flags["pre_train"]
        raise UserError(f"{args.pre_train}: missing; --published {args.published} starts from the student of {first}: run "
                        f"scripts/{experiments()[first].script}.sh first, or give --pre_train FILE")


def name_of_run(folder: Path) -> str:
    """Return the --published of the run in that folder, from its config.txt; an empty string where it has none."""
    path, flag = folder / "config.txt", "--published "
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return next((line.removeprefix(flag) for line in lines if line.startswith(flag)), "")


def comparison(name: str, psnrs: Mapping[str, float | None], args) -> str:
    """Return a line for each data set that compares its PSNR (dB) with the published one; empty where there is none.

    Nothing is compared at another scale or width than the published one, nor in another colour space or with other borders.
    """
    found = experiments().get(name)
    if not found:
        return ""
    of_published = int(found.flags["scale"]), float(found.flags.get("width_mult", 0))
    border = args.scale if args.scale > 1 else 0
    of_metric = args.metric_space, border if args.shave is None else args.shave
    if of_published != (args.scale, args.width_mult or 0) or of_metric != (found.flags.get("metric_space", "y"), border):
        return ""
    ensemble = "self_ensemble" in found.flags
    how = "" if ensemble == args.self_ensemble else f" with{'' if ensemble else 'out'} self-ensemble"
    lines = [f"{dataset} {psnr:.2f} (published {name.replace('/', ' ')}{how}: {found.scores[dataset][0]}, "
             f"{psnr - float(found.scores[dataset][0]):+.2f})"
             for dataset, psnr in psnrs.items()
             if psnr is not None and dataset in BENCHMARKS + RESTORATION and dataset in found.scores]
    return "\n".join(lines)


def source(name: str) -> str:
    """Return where the settings of an experiment are from, how certain they are, and what is assumed in them."""
    experiment = experiments()[name]
    return "; ".join(filter(None, (experiment.settings_source, experiment.settings_certainty, experiment.note)))


def listing() -> str:
    """Return a table of all experiments with their PSNR (dB) on the benchmarks of their task, for --published list."""
    width = max(map(len, experiments()))
    lines = [f"{'experiment':<{width}}" + "".join(f"{name:>10}" for name in BENCHMARKS)]
    for name, experiment in experiments().items():
        scores = "".join(f"{experiment.scores.get(dataset, '-')[0]:>10}" for dataset in BENCHMARKS)
        others = "".join(f"  {dataset} {experiment.scores[dataset][0]}" for dataset in RESTORATION
                         if dataset in experiment.scores)
        lines.append(f"{name:<{width}}{scores}{others}" + ("" if experiment.script else "  scores only"))
    return "\n".join(lines)


def markdown() -> str:
    """Return the table of scripts/README.md."""
    repositories = dict.fromkeys(filter(None, map(repository, experiments().values())))
    lines = ["Settings are from " + ", ".join(f"`{name}`" for name in repositories) + ", or from the papers.", "",
             f"| experiment | script | {' | '.join(BENCHMARKS)} | other sets | settings |", "| --- " * 8 + "|"]
    for name, experiment in experiments().items():
        scores = {dataset: "/".join(filter(None, score)) for dataset, score in experiment.scores.items()}
        others = ", ".join(f"{dataset} {score}" for dataset, score in scores.items() if dataset not in BENCHMARKS)
        script = f"`{experiment.script}.sh`" if experiment.script else "-"
        settings = source(name).removeprefix(repository(experiment)).strip()
        cells = [name, script, *(scores.get(dataset, "") for dataset in BENCHMARKS), others, settings]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def repository(experiment: Experiment) -> str:
    """Return the repository and commit that an experiment's settings are from, an empty string where it is the paper."""
    first = experiment.settings_source.partition(" ")[0]
    return first if "@" in first else ""


def script_text(experiment: Experiment) -> str:
    """Return the shell script that trains as published."""
    return f"""#!/usr/bin/env bash
# {experiment.name} as published, {experiment.paper}; arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --published {experiment.name} "$@"
"""


def write_scripts_and_table() -> None:
    """Write a script for each training, and the table in scripts/README.md."""
    for experiment in experiments().values():
        if experiment.script:
            (ROOT / "scripts" / f"{experiment.script}.sh").write_text(script_text(experiment))
    readme = ROOT / "scripts" / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + markdown() + END + rest.split(END)[1])


if __name__ == "__main__":
    write_scripts_and_table()
