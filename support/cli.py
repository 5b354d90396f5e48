r"""Make a command line from a dataclass: its fields are the flags.

    @dataclass
    class Config:
        steps: int = flag(1000, "training steps", group="training")
        lr: float = flag(1e-3, "learning rate", resume=True)

    config = parse_into(Config, ["--lr", "1e-4"])    # config.lr, config.steps, config.given

Name, type and default of a flag are those of the field; flag() adds the help text. A class may have

    prog, usage, description, examples   texts for --help
    unused                               inherited fields that are not flags of this program
    recipe(given) -> dict                defaults that depend on other flags, such as a preset's
    check()                              raises ValueError; each message begins with its flag

A value on the command line replaces the recipe's, and the recipe's replaces the default. Not here:
the meaning of the flags.

    python -c "from support.cli import flag; print(flag(1, 'a number').metadata['help'])"
"""

import argparse
import math
import textwrap
import types
import typing
from dataclasses import MISSING, field, fields


def flag(default, help, choices=None, resume=False, short=None, positional=None, nargs=None,
         group=None, metavar=None, shown=None, low=None, above=None, below=math.inf):
    """A dataclass field that is a flag.

    choices     allowed values
    resume      the value may change when a run is resumed
    short       a second spelling, such as "-n"
    positional  the name of a positional argument; nargs "*" or "+" collects several
    nargs       "+" for a flag of several values (a tuple), or their number
    group       title of the --help section that begins with this field
    shown       text that --help prints instead of the default
    low, above, below   a number must be at least `low`, more than `above`, less than `below`
    """
    return field(default=default, metadata=dict(
        help=help, choices=choices, resume=resume, short=short, positional=positional, nargs=nargs,
        group=group, metavar=metavar, shown=shown, low=low, above=above, below=below))


def device_flag():
    """The field for --device, which support/device.py reads."""
    return flag("auto", "where to compute; auto: cuda if there is a GPU, else cpu; mps (Apple's "
                "GPU) is untested", choices=("auto", "cuda", "mps", "cpu"), resume=True)


def flag_name(name):
    """A field's name as typed: sa_k -> --sa-k."""
    return "--" + name.replace("_", "-")


def require(config, name, condition, text):
    """ValueError that begins with the flag of this field, unless the condition holds."""
    if not condition:
        raise ValueError(f"{flag_name(name)} {text}, not {getattr(config, name)}")


def parse_into(cls, argv=None):
    """Parse the command line into cls(...) and check it. .given holds the names of typed fields."""
    given = vars(make_parser(cls).parse_intermixed_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in given.items()}
    recipe = cls.recipe(given) if hasattr(cls, "recipe") else {}
    config = cls(**{**recipe, **given})
    config.given = frozenset(given)
    for f in fields(cls):
        check_limits(f, getattr(config, f.name))
    config.check()
    return config


def check_limits(f, value):
    """ValueError that begins with the flag if a field's number is outside its limits."""
    low, above, below = (f.metadata.get(k) for k in ("low", "above", "below"))
    if value is None or low is above is None:
        return
    if (value > above if low is None else value >= low) and value < below:
        return
    text = f"above {above}" if low is None else f"at least {low}"
    text = "0 or more" if low == 0 and below == math.inf else text
    text += f" and below {below}" if below < math.inf else ""
    raise ValueError(f"{flag_name(f.name)} must be {text}, not {value}")


def make_parser(cls):
    """The argparse parser of a config class. Its result contains only the typed flags."""
    examples = getattr(cls, "examples", "")
    parser = argparse.ArgumentParser(
        prog=cls.prog, usage=getattr(cls, "usage", None),
        description="\n".join(textwrap.fill(line, 79) for line in cls.description.splitlines()),
        epilog=f"examples\n{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    hints, section, sections = typing.get_type_hints(cls), parser, {}
    for f in fields(cls):
        info = f.metadata
        if not info:  # a plain field, which recipe() or check() sets
            continue
        if info["group"]:
            section = sections.setdefault(info["group"], None) or parser.add_argument_group(
                info["group"])
            sections[info["group"]] = section
        if f.name in getattr(cls, "unused", ()):
            continue
        add_flag(section, f, hints[f.name])
    return parser


def add_flag(section, f, hint):
    """Add one field to a parser or an argument group."""
    info, default = f.metadata, None if f.default is MISSING else f.default
    shown = info["shown"]
    if shown is None and default not in (None, "", ()) and not isinstance(default, bool):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else f"{default}"
    text = info["help"] + (f" (default: {shown})" if shown else "")
    text = text.replace("%", "%%")
    if info["positional"]:
        nargs = info["nargs"] or (None if info["choices"] else "?")  # a choice is required
        section.add_argument(f.name, nargs=nargs, metavar=info["positional"],
                             choices=info["choices"], help=text)
        return
    names = ([info["short"]] if info["short"] else []) + [flag_name(f.name)]
    kind = element_type(hint)
    if kind is bool:
        section.add_argument(*names, action=argparse.BooleanOptionalAction, help=text)
        return
    section.add_argument(*names, type=kind, choices=info["choices"], nargs=info["nargs"],
                         metavar=info["metavar"], help=text)


def element_type(hint):
    """int | None -> int; tuple[float, ...] -> float; Path -> Path."""
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return hint
