"""The command line for packed files: `python -m lc_compress inspect | verify | to-dense`."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from .storage import FormatError, inspect, to_dense, verify

OK, BROKEN, USAGE, UNREADABLE = 0, 1, 2, 3

_EPILOG = """\
exit codes:
  0  done
  1  the file is damaged, of an unknown version, or has unknown parts
  2  wrong arguments
  3  a file cannot be read or written

examples:
  python -m lc_compress inspect resnet20.lc
  python -m lc_compress inspect resnet20.lc --json | jq '.rows[-1].ratio'
  python -m lc_compress verify resnet20.lc && echo intact
  python -m lc_compress to-dense resnet20.lc resnet20.safetensors
  python -m lc_compress verify mine.lc --part my_package.parts:MyPart
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lc_compress",
        description="Look into, check and expand packed models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("inspect", "a table per layer: parts, bits, ratio, bytes; totals (reads the index only)"),
        ("verify", "compare all checksums, and everything else that the format promises"),
        ("to-dense", "write the dense weights as a plain safetensors file"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("file", metavar="FILE", help="a packed file")
        if name == "to-dense":
            command.add_argument("out", metavar="OUT", help="the safetensors file to write")
        if name == "inspect":
            command.add_argument("--json", action="store_true", help="JSON instead of a table")
        command.add_argument(
            "--part",
            action="append",
            default=[],
            metavar="MODULE:CLASS",
            help="class of a third-party part that the file may name; imports MODULE",
        )
    return parser


def _classes(names: Sequence[str]) -> list[type]:
    found = []
    for name in names:
        module, _, cls = name.partition(":")
        try:
            found.append(getattr(importlib.import_module(module), cls))
        except Exception as cause:  # the module is the caller's and may raise anything
            raise SystemExit(
                _complain(f"--part {name}: {cause}. Give MODULE:CLASS.", USAGE)
            ) from None
    return found


def _complain(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without the table's letters
        sys.stdout.reconfigure(errors="replace")
    options = _parser().parse_args(argv)
    parts = _classes(options.part)
    try:
        if options.command == "inspect":
            report = inspect(options.file, parts=parts)
            print(report.json() if options.json else report)
        elif options.command == "verify":
            count = verify(options.file, parts=parts)
            print(f"{options.file}: {count} records, all intact")
        else:
            to_dense(options.file, options.out, parts=parts)
            print(f"{options.out}: written")
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return OK
    except FormatError as cause:
        return _complain(str(cause), BROKEN)
    except (TypeError, ValueError) as cause:
        return _complain(str(cause), USAGE)
    except OSError as cause:
        return _complain(str(cause), UNREADABLE)
    return OK


if __name__ == "__main__":
    sys.exit(main())
