"""rotation-ssl orient."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rotation_ssl.cli.options import add_command, add_device, check_output, positive
from rotation_ssl.embedding.files import check_local
from rotation_ssl.files import replace_file, write_csv
from rotation_ssl.images import HEIF_SUFFIXES, find_images, is_searched, large_images_allowed, register_heif
from rotation_ssl.machine import cpus
from rotation_ssl.messages import counted, first_line, printable
from rotation_ssl.models import ORIENTATION_MODEL, load_model
from rotation_ssl.orientation import Orientation, calibration, predict_orientation
from rotation_ssl.orientation.exif import turned
from rotation_ssl.orientation.predict import check_head
from rotation_ssl.orientation.turning import Picture, open_picture, turn_pixels, turn_tag, write_picture
from rotation_ssl.progress import progress

BATCH = 32  # pictures in memory at a time, twice as many while the next ones are read
DETAILS = """

PATHS are pictures and folders, which are searched recursively. For each picture the command prints k (the picture, as
viewers display it, is rotated by k x 90 degrees counter-clockwise), the rotation that corrects it in degrees clockwise
(cw) and counter-clockwise (ccw), its current and corrected EXIF orientation, and the confidence. A picture whose
confidence is below the threshold is undecided and is never changed: turning a picture the wrong way is worse than
leaving it alone. --json and --csv also tell the outcome (upright, to turn, turned, undecided or failed) and the error
of a picture that failed.

Without --apply, no picture is changed; --apply needs either -o DIR or --in-place. --apply exif writes the EXIF
orientation of JPEG, PNG, WebP and TIFF files; all other bytes stay the same. --apply pixels turns the pixels and
removes the orientation; this re-encodes JPEG files. HEIC files are never written, and in folders they are skipped
unless pillow-heif is installed. Pictures that need turning are written to DIR (-o DIR) or overwritten (--in-place).
Other files in DIR are not replaced without --force. DIR must not be inside a folder of PATHS.

Pictures that cannot be read or written are left as they are and listed as failed; the exit status is then 1.
"""


@dataclasses.dataclass(frozen=True)
class Record:
    """What the command tells of a picture; of one that cannot be read there are only the path and the error.

    ``outcome`` is upright, to turn (without --apply), turned, undecided or failed.
    """

    path: str
    rotation: int | None = None
    fix_cw: int | None = None
    fix_ccw: int | None = None
    exif: int | None = None
    exif_fixed: int | None = None
    confidence: float | None = None
    decided: bool | None = None
    outcome: str = "failed"
    error: str = ""


def add(commands: Any) -> None:
    """Add the command."""
    added = add_command(commands, "orient", run, "find out which way up photographs are, and turn them", DETAILS, False)
    added.add_argument("paths", type=Path, nargs="+", metavar="PATHS", help="pictures and folders of pictures")
    added.add_argument(
        "--threshold", type=float, metavar="P", help="minimum confidence [the fitted one, if the model has one]"
    )
    out = added.add_mutually_exclusive_group()
    out.add_argument("--json", action="store_true", help="print a JSON object for each picture, one per line")
    out.add_argument("--csv", type=Path, metavar="FILE", help="write the table to a CSV file")
    added.add_argument("--apply", choices=("exif", "pixels"), help="how to turn the pictures that need turning")
    where = added.add_mutually_exclusive_group()
    where.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder for the fixed pictures")
    where.add_argument("--in-place", action="store_true", help="replace the pictures")
    added.add_argument("--force", action="store_true", help="replace other files in DIR, and FILE")
    added.add_argument("--keep-times", action="store_true", help="keep the modification times of fixed pictures")
    added.add_argument(
        "--model",
        default=ORIENTATION_MODEL,
        help="timm model with four outputs: model.tag, local-dir:... [%(default)s]",
    )
    added.add_argument("--workers", type=positive, default=cpus(), help="reading threads [one for each CPU]")
    add_device(added)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if args.apply and not (args.output or args.in_place):
        raise ValueError("--apply needs -o DIR or --in-place: add one of them")
    if (args.output or args.in_place) and not args.apply:
        raise ValueError("-o and --in-place need --apply exif or --apply pixels: add one of them")
    if args.keep_times and not args.apply:
        raise ValueError("--keep-times is for the pictures that --apply changes: give both, or neither")
    if args.output:
        check_local(args.output)
        check_folder(args.output, args.paths)
    model = load_model(args.model, args.device)
    check_head(model)
    fitted = calibration(model)
    threshold = _threshold(fitted.threshold if args.threshold is None else args.threshold, args.model)
    has_heif = register_heif()
    targets = find_targets(args.paths, args.output)
    if args.csv:
        check_output(args.csv, targets, args.force)
    if not has_heif and any(path.suffix.lower() in HEIF_SUFFIXES for path in targets):
        raise ValueError("HEIC and HEIF pictures need pillow-heif: pip install 'rotation-ssl[heif]'")
    counts: Counter[str] = Counter()
    with large_images_allowed(), _table(args) as show, ThreadPoolExecutor(args.workers) as pool:
        for batch in read_pictures(list(targets), fitted.size, pool):
            shown = [one.image for one in batch if isinstance(one, Picture)]
            found = iter(predict_orientation(model, shown, fitted.temperature, size=fitted.size))
            records = [_record(one, next(found), threshold) if isinstance(one, Picture) else one for one in batch]
            # all are looked at before one of them is changed
            _write_batch(records, targets, args, pool, counts, show)
    if not args.json:
        print(_summary(counts, args, threshold))
    return 1 if counts["failed"] else 0


def check_folder(output: Path, paths: Sequence[Path]) -> None:
    """Refuse a folder for fixed pictures below one of the folders that are searched, unless it is hidden there.

    Raises:
        ValueError: it is below one: the next run would take the fixed pictures for others.
    """
    for path in paths:
        root, target = path.resolve(), output.resolve()
        if path.is_dir() and root in target.parents and all(map(is_searched, target.relative_to(root).parts)):
            raise ValueError(f"{output} is inside {path}, where the next run would find it: give another -o DIR")


def find_targets(paths: Sequence[Path], output: Path | None) -> dict[Path, Path]:
    """Each picture and the file that it is written to if it is fixed, in the order of the paths.

    Raises:
        ValueError: no pictures, two of them that would be written to one file, or an output that is one of them.
    """
    targets: dict[Path, Path] = {}
    written: dict[str, str] = {}
    for path in paths:
        for picture in find_images(path) if path.is_dir() else [path]:
            if picture in targets:
                continue
            target = picture if output is None else output / picture.relative_to(path if path.is_dir() else path.parent)
            # a picture that has two names is turned once
            file, source = os.path.realpath(target), os.path.realpath(picture)
            if file not in written:
                targets[picture], written[file] = target, source
            elif written[file] != source:
                raise ValueError(f"two pictures would be written to {target}: give one folder at a time")
    if output is not None and (replaced := set(written) & set(written.values())):
        raise ValueError(f"{min(replaced)} would be replaced: give another -o DIR, or --in-place to replace pictures")
    return targets


def read_pictures(paths: Sequence[Path], size: int, pool: ThreadPoolExecutor) -> Iterator[list[Picture | Record]]:
    """The pictures, some at a time, while the next ones are read; records of those that cannot be read."""

    def read(path: Path) -> Picture | Record:
        try:
            return open_picture(path, size)
        except ValueError as error:
            return Record(str(path), error=printable(error))

    parts = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    following = pool.map(read, parts[0])
    with progress("pictures", len(paths), disable=len(paths) < BATCH) as bar:
        for number in range(len(parts)):
            results = list(following)
            if number + 1 < len(parts):
                following = pool.map(read, parts[number + 1])
            for result in results:
                if isinstance(result, Record):
                    tqdm.write(f"error: {result.error}", file=sys.stderr)
            yield results
            bar.update(len(results))


def _record(picture: Picture, found: Orientation, threshold: float) -> Record:
    """What is known of a picture before it is written."""
    decided = found.confidence >= threshold
    return Record(
        str(picture.path), found.rotation, found.fix_cw, found.fix_ccw, picture.exif,
        turned(picture.exif, found.rotation), round(found.confidence, 4), decided,
        "undecided" if not decided else "to turn" if found.rotation else "upright",
    )  # fmt: skip


def _write_batch(
    records: Sequence[Record],
    targets: dict[Path, Path],
    args: argparse.Namespace,
    pool: ThreadPoolExecutor,
    counts: Counter[str],
    show: Callable[[Record], None],
) -> None:
    """Write the pictures of a batch that are to be fixed; count and show all of them, in their order."""
    futures: dict[Future[Record], Record] = {}
    try:
        for record in records:
            futures[pool.submit(_write, record, targets[Path(record.path)], args)] = record
        for future in list(futures):
            written = future.result()
            counts[written.outcome] += 1
            show(written)
            del futures[future]
    except BaseException:
        # threads go on when the command is interrupted: what they have begun is written, and must be shown
        begun = {future: record for future, record in futures.items() if not future.cancel()}
        wait(begun)
        for future, record in begun.items():
            error = future.exception()
            show(_failed(record, first_line(error)) if error else future.result())
        raise


def _write(record: Record, target: Path, args: argparse.Namespace) -> Record:
    """Write the picture if it is to be fixed; returns its record with what came of it."""
    if record.outcome != "to turn" or not args.apply:
        return record
    path, exif, quarters = Path(record.path), record.exif or 1, record.rotation or 0
    try:
        content = turn_tag(path, exif, quarters) if args.apply == "exif" else turn_pixels(path, quarters)
        if args.output and not args.force and target.exists() and target.read_bytes() != content:
            raise ValueError(f"{target} exists and is another file: give another -o DIR, or --force to replace it")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_picture(path, target, content, args.keep_times)
    except (ValueError, OSError) as error:
        told = printable(error)
        tqdm.write(f"error: {told}", file=sys.stderr)
        return _failed(record, told)
    # a file whose pixels were turned has no orientation left
    fixed = record.exif_fixed if args.apply == "exif" else 1
    return dataclasses.replace(record, exif_fixed=fixed, outcome="turned")


def _failed(record: Record, error: str) -> Record:
    return dataclasses.replace(record, outcome="failed", error=error)


@contextlib.contextmanager
def _table(args: argparse.Namespace) -> Iterator[Callable[[Record], None]]:
    """What shows a record, in the form that was asked for."""
    names = [field.name for field in dataclasses.fields(Record)]
    if args.json:
        yield lambda record: tqdm.write(json.dumps(dataclasses.asdict(record)))
    elif args.csv:
        rows: list[Record] = []
        try:
            yield rows.append
        finally:
            # also of a run that is interrupted: it says which pictures were turned
            replace_file(args.csv, lambda file: write_csv(file, names, map(dataclasses.astuple, rows)))
    else:
        tqdm.write("k   cw  ccw  exif  confidence  picture")
        yield lambda record: tqdm.write(_line(record))


def _line(record: Record) -> str:
    note = f"  ({record.outcome})" if record.outcome in ("undecided", "failed") else ""
    if record.confidence is None:
        numbers = f"-    -    -     - {'-':>11s}"
    else:
        exif = f"{record.exif}" if record.exif == record.exif_fixed else f"{record.exif}->{record.exif_fixed}"
        numbers = f"{record.rotation} {record.fix_cw:4d} {record.fix_ccw:4d}  {exif:>4s}  {record.confidence:10.4f}"
    return f"{numbers}  {printable(record.path)}{note}"


def _summary(counts: Counter[str], args: argparse.Namespace, threshold: float) -> str:
    done = f"{counts['turned']:,} turned"
    if not args.apply:
        done = f"{counts['to turn']:,} to turn (nothing is written without --apply)"
    return (
        f"{counted(sum(counts.values()), 'picture')}: {counts['upright']:,} upright, {done}, "
        f"{counts['undecided']:,} undecided at a threshold of {threshold:.4g}, {counts['failed']:,} failed"
    )


def _threshold(chosen: float | None, model: str) -> float:
    if chosen is None:
        raise ValueError(f"no threshold is known for {model}: give --threshold, a confidence of 0 to 1")
    if not 0 <= chosen <= 1:
        raise ValueError(f"--threshold must be 0 to 1, got {chosen}")
    return chosen
