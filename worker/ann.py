"""Everything that needs faiss: the exact scan of one query, and the derived indexes.

Labels are row numbers of one segment. Nothing is ever removed from or added to an index that is
searched: dead rows are left out by a bitmap, and a new segment gets a new index.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import faiss as untyped_faiss
import numpy as np
from numpy.typing import NDArray

from vecfleet.common.errors import CorruptData
from vecfleet.worker.exact_scan import Scores, scan, score_rows, widen
from vecfleet.worker.index_policy import RESCORE_FACTOR
from vecfleet.worker.liveness import Liveness
from vecfleet.worker.partition_state import IndexKind
from vecfleet.worker.rows import RowNumbers
from vecfleet.worker.segment import HEADER_BYTES, SCRATCH_BYTES, Segment
from vecfleet.worker.signs import Codes

faiss: Any = untyped_faiss  # its type stubs cover a part of it only

SHARED_PASS_QUERIES = 8  # from here on one pass of numpy for all queries beats a pass for each
HNSW_LINKS = 32
HNSW_BUILD_EFFORT = 200
SPARE_HITS = 16
TWO_LEVELS_FROM = 256  # lists
OUTER_ROUNDS = 8
INNER_ROUNDS = 8
REFINING_ROUNDS = 2
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of the system, and no fault of the file
_FP16: Final = faiss.ScalarQuantizer.QT_fp16
_IP: Final = faiss.METRIC_INNER_PRODUCT

Found = tuple[Scores, RowNumbers]  # (q, k) scores, best first, and rows; -inf and -1 where none


def set_threads(count: int) -> None:
    """How many threads faiss may use in this process."""
    faiss.omp_set_num_threads(count)


class FlatScan:
    """The exact scan of one segment, over its mapped vectors, without a copy."""

    def __init__(self, segment: Segment) -> None:
        """Lay a faiss index over the vectors of ``segment``."""
        self._vectors = segment.rows.vectors
        self._segment = segment
        n, dimension = self._vectors.shape
        empty = faiss.IndexScalarQuantizer(dimension, _FP16, _IP)
        empty.is_trained = True
        empty.ntotal = n
        # A stored index of this kind ends with the number of its code bytes and the codes. The
        # codes are there already; the rest is written in front of them, into the private copy of
        # the header's page.
        header = faiss.serialize_index(empty).tobytes()[:-8] + (n * dimension * 2).to_bytes(
            8, "little"
        )
        if len(header) > SCRATCH_BYTES:
            raise CorruptData("faiss's header of a flat index has outgrown its place")
        start = HEADER_BYTES - len(header)
        segment.buffer[start:HEADER_BYTES] = header
        self._bytes = np.frombuffer(segment.buffer, np.uint8, offset=start)
        length = len(header) + n * dimension * 2
        self._reader = faiss.ZeroCopyIOReader(faiss.swig_ptr(self._bytes), length)
        self._index = faiss.read_index(self._reader)
        if self._index.ntotal != n or self._index.codes.is_owned:
            raise CorruptData("faiss did not map the vectors of a segment")

    def search(self, queries: Scores, k: int, liveness: Liveness) -> Found:
        """The ``k`` best visible rows of each query (q, d)."""
        if len(queries) >= SHARED_PASS_QUERIES:
            visible = None if liveness.all_visible else liveness.visible
            return scan(self._vectors, queries, k, visible)
        hidden = len(liveness.visible) - liveness.visible_count
        if not hidden:
            return self._padded(self._index.search(queries, min(k, len(self._vectors))), k)
        # A bitmap doubles the time of a scan, so a little more is fetched first and filtered.
        more = k + SPARE_HITS + 2 * k * hidden // len(liveness.visible)
        if more < len(self._vectors):
            scores, rows = self._index.search(queries, more)
            seen = liveness.visible[rows]
            if (np.count_nonzero(seen, axis=1) >= k).all():
                return _kept(scores, rows, seen, k)
        selector = faiss.IDSelectorBitmap(liveness.bitmap)
        parameters = faiss.SearchParameters(sel=selector)
        found = self._index.search(queries, min(k, len(self._vectors)), params=parameters)
        return self._padded(found, k)

    def _padded(self, found: tuple[Scores, RowNumbers], k: int) -> Found:
        return _padded(*found, k)


class DerivedIndex:
    """A stored index of one segment, mapped; finds candidates and scores them exactly."""

    def __init__(self, path: Path, kind: IndexKind, effort: int, template: str) -> None:
        """Map the file; ``effort`` is nprobe or efSearch.

        Raises ``CorruptData``, and an ``OSError`` of ``SHORTAGES`` where the system has no file or
        no memory left for it.
        """
        self.effort = effort
        self.template = template
        self._kind = kind
        try:
            self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            for number in SHORTAGES:  # faiss tells them in words alone
                if str(error).endswith(os.strerror(number)):
                    raise OSError(number, os.strerror(number), path.name) from error
            raise CorruptData(f"{path.name} is no index: {error}") from error

    def search(
        self,
        queries: Scores,
        k: int,
        liveness: Liveness,
        vectors: NDArray[np.float16],
        lists: NearestLists,
    ) -> Found:
        """The ``k`` best visible rows of each query, rescored with the segment's own vectors."""
        rows = self.candidates(queries, k, liveness, lists, self.effort)
        return rescored(queries, rows, vectors, k)

    def candidates(
        self,
        queries: Scores,
        k: int,
        liveness: Liveness | None,
        lists: NearestLists,
        effort: int,
    ) -> RowNumbers:
        """(q, RESCORE_FACTOR * k) rows by the index's own coarse scores, -1 where there is none."""
        selector = None
        if liveness is not None and not liveness.all_visible:
            selector = faiss.IDSelectorBitmap(liveness.bitmap)
        wanted = min(RESCORE_FACTOR * k, self._index.ntotal)
        if self._kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(effort, wanted), sel=selector)
            found: RowNumbers = self._index.search(queries, wanted, params=parameters)[1]
            return found
        distances, numbers = lists.nearest(self.template, self._index.quantizer, queries, effort)
        parameters = faiss.SearchParametersIVF(nprobe=effort, sel=selector)
        scores = np.empty((len(queries), wanted), np.float32)
        rows = np.empty((len(queries), wanted), np.int64)
        arrays = [faiss.swig_ptr(array) for array in (numbers, distances, scores, rows)]
        self._index.search_preassigned_c(
            len(queries), faiss.swig_ptr(queries), wanted, *arrays, False, parameters
        )
        return rows


class NearestLists:
    """Which lists are nearest to the queries of one call, found once for all of a template."""

    def __init__(self, most: Mapping[str, int]) -> None:
        """``most`` is the highest effort among the indexes of each template."""
        self._most = most
        self._found: dict[str, tuple[Scores, RowNumbers]] = {}

    def nearest(
        self, template: str, quantizer: Any, queries: Scores, count: int
    ) -> tuple[Scores, RowNumbers]:
        """The ``count`` nearest lists of each query: distances and numbers, (q, count)."""
        if template not in self._found:
            self._found[template] = quantizer.search(queries, self._most[template])
        distances, numbers = self._found[template]
        return (
            np.ascontiguousarray(distances[:, :count]),
            np.ascontiguousarray(numbers[:, :count]),
        )


def code_distances(codes: Codes, code: Codes) -> NDArray[np.int32]:
    """In how many bits each of ``codes`` (n, b) differs from ``code`` (b,), as (n,)."""
    distances = np.empty(len(codes), np.int32)
    arrays = [faiss.swig_ptr(array) for array in (code, codes)]
    faiss.hammings(*arrays, 1, *codes.shape, faiss.swig_ptr(distances))
    return distances


def nothing_found(queries: int, k: int) -> Found:
    """The finds of a search without any."""
    return np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1, np.int64)


def rescored(
    queries: Scores, candidates: Iterable[RowNumbers], vectors: NDArray[np.float16], k: int
) -> Found:
    """The ``k`` best of each query's ``candidates``, rows with -1 for none, by exact scores."""
    best, labels = nothing_found(len(queries), k)
    for query, found in enumerate(candidates):
        found = found[found >= 0]
        scores = score_rows(vectors, queries[query], found)
        order = np.argsort(-scores, kind="stable")[:k]
        best[query, : len(order)] = scores[order]
        labels[query, : len(order)] = found[order]
    return best, labels


def train_ivf(sample: NDArray[np.float16], nlist: int) -> bytes:
    """A template: an IVF,SQ8 trained on ``sample`` (m, d), without vectors.

    The centroids come from clusters of clusters and two rounds over all of them: a fifth of the
    time of ten rounds, and lists that are as good.
    """
    floats = widen(sample)
    index = faiss.index_factory(sample.shape[1], f"IVF{nlist},SQ8", _IP)
    if nlist >= TWO_LEVELS_FROM:
        index.quantizer.add(_two_levels(floats, nlist))
    index.cp.min_points_per_centroid = 1
    index.train(floats)
    template: bytes = faiss.serialize_index(index).tobytes()
    return template


def _two_levels(sample: Scores, nlist: int) -> Scores:
    """``nlist`` centroids of ``sample``: clusters, divided by their size, then refined together."""
    outer = math.isqrt(nlist)
    first = _kmeans(sample, outer, OUTER_ROUNDS)
    owners = first.index.search(sample, 1)[1][:, 0]
    sizes = np.bincount(owners, minlength=outer)
    shares = np.diff(np.round(np.cumsum(sizes) / len(sample) * nlist).astype(int), prepend=0)
    centroids: list[Scores] = []
    for owner, share in enumerate(shares.tolist()):
        members = sample[owners == owner]
        if share and len(members) <= share:
            centroids.append(np.resize(members, (share, sample.shape[1])))
        elif share:
            centroids.append(_kmeans(members, share, INNER_ROUNDS).centroids)
    start = np.concatenate(centroids)
    refined: Scores = _kmeans(sample, nlist, REFINING_ROUNDS, start).centroids
    return refined


def _kmeans(sample: Scores, count: int, rounds: int, start: Scores | None = None) -> Any:
    kmeans = faiss.Kmeans(
        sample.shape[1], count, niter=rounds, spherical=True, min_points_per_centroid=1, seed=1
    )
    kmeans.train(sample, init_centroids=start)
    return kmeans


def build_ivf(
    template: bytes,
    pieces: Iterable[tuple[NDArray[np.float16], RowNumbers]],
    reused: Iterable[tuple[Path, RowNumbers]] = (),
) -> Any:
    """The index of a segment, from a template.

    ``pieces`` are vectors with their rows. ``reused`` are indexes of the same template whose codes
    are taken as they are, each with the new row of every old row, or -1: finding a vector's list
    is nearly all of the work of adding it.
    """
    index = faiss.deserialize_index(np.frombuffer(template, np.uint8))
    for path, moved in reused:
        _copy_lists(index, path, moved)
    for vectors, rows in pieces:
        index.add_with_ids(widen(vectors), rows)
    return index


def _copy_lists(index: Any, path: Path, moved: RowNumbers) -> None:
    source = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    lists, target, code_size = source.invlists, index.invlists, source.code_size
    for number in range(source.nlist):
        size = lists.list_size(number)
        if not size:
            continue
        rows = moved[faiss.rev_swig_ptr(lists.get_ids(number), size)]
        kept = rows >= 0
        codes = faiss.rev_swig_ptr(lists.get_codes(number), size * code_size)
        codes = np.ascontiguousarray(codes.reshape(size, code_size)[kept])
        rows = np.ascontiguousarray(rows[kept])
        if len(rows):
            target.add_entries(number, len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(codes))
            index.ntotal += len(rows)


def build_hnsw(dimension: int, pieces: Iterable[NDArray[np.float16]]) -> Any:
    """The HNSW graph of a segment's vectors, kept in half precision."""
    index = faiss.IndexHNSWSQ(dimension, _FP16, HNSW_LINKS, _IP)
    index.hnsw.efConstruction = HNSW_BUILD_EFFORT
    index.is_trained = True
    index.storage.is_trained = True
    for piece in pieces:
        index.add(widen(piece))
    return index


def store(index: Any, write: Callable[[bytes], object]) -> None:
    """Hand the stored form of ``index`` to ``write``, piece by piece."""
    writer = faiss.PyCallbackIOWriter(write, 1 << 20)
    faiss.write_index(index, writer)
    del writer  # flushes


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def _kept(scores: Scores, rows: RowNumbers, seen: NDArray[np.bool_], k: int) -> Found:
    """The first ``k`` seen hits of each query."""
    places = np.argsort(~seen, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, places, 1), np.take_along_axis(rows, places, 1)


def _padded(scores: Scores, rows: RowNumbers, k: int) -> Found:
    missing = k - scores.shape[1]
    if missing > 0:
        scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
        rows = np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
    scores[rows < 0] = -np.inf
    return scores, rows
