"""The cache's benchmark data as one archive, for a host that reaches no hub."""

import argparse
import sys
import tarfile
from pathlib import Path

from eval.benchmarks import BENCHMARKS
from eval.fetch import cached, default_cache


def pack(arguments: list[str]) -> int:
    """Print a tar of the sets' files; unpacked over another cache, that one has them.

    Of those that are not there a line on the standard error says how to get them.

    Raises:
        OSError: one cannot be read, or the archive not written.
    """
    parser = argparse.ArgumentParser(prog="python -m eval pack", description="Pack questions.")
    parser.add_argument("--cache", type=Path, default=default_cache())
    cache, missing = parser.parse_args(arguments).cache, list[str]()
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
        for name, known in BENCHMARKS.items():
            if not known.repository:
                continue
            path = cached(known.repository, known.file, known.revision, cache)
            if not path:
                missing.append(name)
                continue
            with path.open("rb") as file:  # through the cache's link, to what it leads to
                entry = tar.gettarinfo(arcname=str(path.relative_to(cache)), fileobj=file)
                entry.mode, entry.uname, entry.gname = 0o644, "", ""
                tar.addfile(entry, file)
    if missing:
        print(
            f"eval: not packed, since not in {cache}: {', '.join(missing)}; where the hub can be "
            "reached `python -m eval fetch` (compose: docker compose run --rm fetch) brings them, "
            "then again",
            file=sys.stderr,
        )
    return 0
