"""The student and its teachers, as the flags ask for them."""
from system.errors import UserError

from model import inherit, load_as_told, load_model, make_model, require_rgb, slim
from model.teachers import teacher_path


def make_networks(args, needs):
    """-> (student, teachers); no teachers where nothing needs one.

    The student is new, or starts from --pre_train, or from the teacher's weights (--init_from_teacher), or is a slice of
    the teacher that shares its weights (--width_mult).
    """
    if args.width_mult:
        whole = make_whole(args)
        return slim(whole, args.width_mult), [whole]
    if args.init_from_teacher and len(args.teacher) > 1:
        raise UserError(f"--init_from_teacher copies from one teacher, --teacher names {len(args.teacher)}")
    student = make_student(args)  # first: the same seed gives the same student, whatever teaches it
    asked = bool(needs & {"teacher", "teacher_net"})
    teachers = make_teachers(args) if asked or args.init_from_teacher else []
    if args.init_from_teacher:
        inherit(student, teachers[0])
    return student, teachers if asked else []


def make_whole(args):
    """The one network of which the student is to be a slice: the teacher, --pre_train, or a new one."""
    if args.init_from_teacher:
        raise UserError("--init_from_teacher copies what --width_mult shares: give the one or the other")
    if "teacher" not in args.given:
        return make_student(args)
    if args.pre_train or len(args.teacher) > 1:
        raise UserError("--width_mult takes its slice of one network: give one --teacher, or --pre_train")
    return load_as_told(teacher_path(args.teacher[0], args.scale), args, without={"width_mult"})


def make_student(args):
    """A network of the flags' kind and sizes, new or with the weights of --pre_train.

    From a file of another scale all but the upsampling is taken, as EDSR's authors did: its x4 started from x2.
    """
    if not args.pre_train:
        return make_model(args.model, args)
    start = load_as_told(args.pre_train, args, without={"scale", "width_mult"})
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
    return [teacher_path(name, args.scale) for name in args.teacher]


def make_teachers(args):
    """The teachers of --teacher: checkpoint files, or names of networks whose checkpoint is in teacher_checkpoint/."""
    teachers = []
    for path in teacher_files(args):
        net = require_rgb(load_model(path, scale=args.scale), path)
        net.rgb_range = args.rgb_range
        teachers.append(net)
    return teachers
