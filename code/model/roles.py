"""The student and its teachers, as the flags ask for them."""
import os

from model import inherit, load_as_told, load_model, make_model, require_rgb, slim
from model.teachers import find_teacher


def make_networks(args, needs):
    """-> (student, teachers); no teachers where nothing needs one.

    The student is new, or starts from --pre_train, or from the teacher's weights (--init_from_teacher), or is a slice of
    the teacher that shares its weights (--width_mult).
    """
    if args.width_mult:
        whole = make_teachers(args)[0] if "teacher" in args.given else make_student(args)
        return slim(whole, args.width_mult), [whole]
    student = make_student(args)  # first: the same seed gives the same student, whatever teaches it
    asked = bool(needs & {"teacher", "teacher_net"})
    teachers = make_teachers(args) if asked or args.init_from_teacher else []
    if args.init_from_teacher:
        inherit(student, teachers[0])
    return student, teachers if asked else []


def make_student(args):
    """A network of the flags' kind and sizes, new or with the weights of --pre_train.

    From a file of another scale all but the upsampling is taken, as EDSR's authors did: its x4 started from x2.
    """
    if not args.pre_train:
        return make_model(args.model, args)
    start = load_as_told(args.pre_train, args, any_scale=True)
    if start.scale == args.scale:
        return start
    student = type(start)(**{**start.config, "scale": args.scale})
    student.rgb_range = args.rgb_range
    state, wanted = start.state_dict(), student.state_dict()
    student.load_state_dict({name: state[name] if name in state and state[name].shape == value.shape else value
                             for name, value in wanted.items()})
    return student


def teacher_files(args):
    """The checkpoint file of each of --teacher."""
    return [name if os.path.exists(name) or os.sep in name or "." in name else find_teacher(name, args.scale)
            for name in args.teacher]


def make_teachers(args):
    """The teachers of --teacher: checkpoint files, or names of networks whose checkpoint is in teacher_checkpoint/."""
    teachers = []
    for path in teacher_files(args):
        net = require_rgb(load_model(path, scale=args.scale), path)
        net.rgb_range = args.rgb_range
        teachers.append(net)
    return teachers
