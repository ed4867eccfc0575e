"""The student and its teachers, built from the flags."""
import logging
from argparse import Namespace
from collections.abc import Set
from os import PathLike

from model import fuse, inherit, load_model, load_with_flags, make_model, require_rgb, slim
from model.common import Network
from model.lora import LowRankAdapted
from model.slicing import Slice
from model.teachers import teacher_path
from system.errors import UserError

log = logging.getLogger("sr")


def make_networks(args: Namespace, needs: Set[str]) -> tuple[Network | Slice | LowRankAdapted, list[Network]]:
    """Build the student and the teachers, an empty list where neither the loss nor --eco needs one.

    needs: the needs of the loss terms. The student is a new network, --pre_train, initialised from the teacher
    (--init_from_teacher), --pre_train with low-rank adapters (--lora_rank), or a channel slice that shares the weights of
    the teacher (--width_mult). Raises UserError for flags that exclude each other and for checkpoints that cannot be loaded.
    """
    if args.lora_rank and (args.width_mult or args.init_from_teacher):
        other = "--width_mult trains" if args.width_mult else "--init_from_teacher replaces"
        raise UserError(f"--lora_rank keeps the weights of --pre_train, but {other} them: give one of the two flags")
    if args.width_mult:
        full_network = make_full_network(args)
        return slim(full_network, args.width_mult), [full_network]
    if args.teacher_choice == "mean" and "features" in needs:
        raise UserError(f"--teacher_choice mean: {args.loss} compares feature maps, of which several teachers have no mean; "
                        "give --teacher_choice random")
    if args.init_from_teacher and len(args.teacher) > 1:
        raise UserError(f"--init_from_teacher copies the weights of one teacher, --teacher names {len(args.teacher)}")
    student = make_student(args)  # before the teachers, so that its initial weights depend on the seed only
    needs_teacher = args.eco or bool(needs & {"teacher", "teacher_net"})
    teachers = make_teachers(args) if needs_teacher or args.init_from_teacher else []
    if args.init_from_teacher:
        inherit(student, teachers[0], args.init_from_teacher)
    if args.lora_rank:
        student = LowRankAdapted(fuse(student), args.lora_rank)  # DSCLoRA adapts the fused convolutions of SPAN
        log.info("--lora_rank %d: adapters of %d convolutions are trained, with %s parameters", args.lora_rank,
                 len(student.names), f"{sum(x.numel() for x in student.adapters.parameters()):,}")
    return student, [fuse(teacher) for teacher in teachers] if needs_teacher else []


def make_full_network(args: Namespace) -> Network:
    """Build the network of which the student is a slice: the teacher, --pre_train, or a new network.

    Raises UserError for flags that exclude each other.
    """
    if args.init_from_teacher:
        raise UserError("--init_from_teacher copies the weights that --width_mult shares: give one or the other")
    if "teacher" not in args.given:
        return make_student(args)
    if args.pre_train or len(args.teacher) > 1:
        raise UserError("--width_mult slices one network: give one --teacher, or --pre_train")
    return load_with_flags(teacher_path(args.teacher[0], args.scale), args, without={"width_mult"})


def make_student(args: Namespace) -> Network:
    """Build a network of the kind and sizes of the flags, with new weights or those of --pre_train.

    From a checkpoint of another scale all weights but those of the upsampler are used, as EDSR's authors trained x4 from x2.
    """
    if not args.pre_train:
        return make_model(args.model, args)
    pretrained = load_with_flags(args.pre_train, args, without={"scale", "width_mult"})
    if pretrained.scale == args.scale:
        return pretrained
    if args.lora_rank:
        raise UserError(f"--lora_rank: {args.pre_train} is a network for scale {pretrained.scale}, whose upsampler does not "
                        f"fit --scale {args.scale}; give a network for that scale")
    try:
        student = type(pretrained)(**{**pretrained.config, "scale": args.scale})
    except ValueError as error:
        raise UserError(f"--pre_train {args.pre_train}, --scale {args.scale}: {error}") from None
    student.rgb_range = args.rgb_range
    state, initial = pretrained.state_dict(), student.state_dict()
    student.load_state_dict({name: state[name] if name in state and state[name].shape == value.shape else value
                             for name, value in initial.items()})
    return student


def teacher_files(args: Namespace) -> list[str | PathLike]:
    """Find the checkpoint file of each teacher of --teacher."""
    return [teacher_path(name, args.scale) for name in args.teacher]


def make_teachers(args: Namespace) -> list[Network]:
    """Load the teachers of --teacher: checkpoint files, or names of networks with a checkpoint in teacher_checkpoint/.

    Raises CheckpointError for a file that is missing, cannot be loaded, or is of another scale.
    """
    teachers = []
    for path in teacher_files(args):
        net = require_rgb(load_model(path, scale=args.scale, tlc_size=args.tlc_size), path)
        net.rgb_range = args.rgb_range
        teachers.append(net)
    return teachers
