import time

import pytest

from vecfleet.common.collection import CollectionSpec
from vecfleet.common.errors import (
    CollectionConflict,
    CorruptManifest,
    InvalidInput,
    InvalidName,
    StaleWriter,
    UnknownCollection,
)
from vecfleet.worker.catalog import FILE_NAME, Catalog, partition_spec

SPEC = CollectionSpec("model", "space", 384)


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog.open(tmp_path)
    yield catalog
    catalog.close()


def test_create_is_idempotent_and_survives_a_restart(catalog, tmp_path):
    made = catalog.create("docs", SPEC)
    assert catalog.create("docs", SPEC) == made
    catalog.close()
    again = Catalog.open(tmp_path)
    assert again.get("docs") == made == again.by_uid(made.uid)
    assert again.list() == [made]
    assert partition_spec(made).dimension == 384
    again.close()


def test_another_spec_is_a_conflict(catalog):
    catalog.create("docs", SPEC)
    with pytest.raises(CollectionConflict) as raised:
        catalog.create("docs", CollectionSpec("model", "space", 768, policy="exact"))
    assert (
        raised.value.message == "collection docs has dimension 384, not 768, policy auto, not exact"
    )
    assert raised.value.field == "dimension"
    with pytest.raises(InvalidInput):
        catalog.create("other", CollectionSpec("model", "space", 384, policy="flat"))


def test_tenants_do_not_see_each_other(catalog):
    first = catalog.create("docs", SPEC, "a")
    second = catalog.create("docs", CollectionSpec("model", "space", 8), "b")
    assert first.uid != second.uid
    assert catalog.list("a") == [first]
    assert len(catalog.list()) == 2
    catalog.delete("docs", "b")
    assert catalog.tenants() == {"-", "a", "b"}
    with pytest.raises(UnknownCollection):
        catalog.get("docs", "c")


@pytest.mark.parametrize(
    "name", ["", "..", ".", "a/b", "a\0b", "../x", "a b", "ｄocs", "x" * 65, "a\n", None, 3]
)
def test_names_are_checked(catalog, name):
    with pytest.raises(InvalidName):
        catalog.create(name, SPEC)
    with pytest.raises(InvalidName):
        catalog.get(name)


def test_delete_removes_the_directory_and_frees_the_name(catalog):
    made = catalog.create("docs", SPEC)
    directory = catalog.directory(made)
    assert directory.parent.name == made.uid
    directory.mkdir(parents=True)
    (directory / "seg").write_text("x")
    assert catalog.delete("docs") == made
    assert directory.exists()  # until its writer is closed
    catalog.remove_deleted()
    assert not directory.parent.exists()
    assert catalog.by_uid(made.uid) is None
    assert catalog.was_deleted(made.uid)
    with pytest.raises(UnknownCollection):
        catalog.get("docs")
    again = catalog.create("docs", CollectionSpec("model", "space", 8))
    assert again.uid != made.uid
    assert not catalog.was_deleted(again.uid)


def test_when_a_deletion_was_asked_for_is_kept(catalog, tmp_path):
    for asked_us in (10, 20):
        catalog.create("docs", SPEC)
        catalog.delete("docs", asked_us=asked_us)
    catalog.close()
    again = Catalog.open(tmp_path)
    between = {(9, 10): True, (19, 30): True, (0, 99): True, (10, 19): False, (20, 99): False}
    for times_us, was in between.items():
        assert again.was_deleted_between("docs", "-", *times_us) is was
    assert not again.was_deleted_between("docs", "acme", 0, 99)
    assert not again.was_deleted_between("other", "-", 0, 99)
    again.close()


def test_deletions_are_not_remembered_for_ever(catalog, monkeypatch):
    old = catalog.create("old", SPEC)
    catalog.delete("old")
    catalog.remove_deleted()
    lately = catalog.create("lately", SPEC)
    after = time.time() + 15 * 24 * 3600
    monkeypatch.setattr("vecfleet.worker.catalog.time.time", lambda: after)
    catalog.delete("lately")
    assert not catalog.was_deleted(old.uid)
    assert catalog.was_deleted(lately.uid)
    assert catalog.deleted(0) == {lately.uid: "-"}


def test_a_deletion_that_was_interrupted_is_finished_at_the_next_start(catalog, tmp_path):
    made = catalog.create("docs", SPEC)
    catalog.delete("docs")
    catalog.directory(made).mkdir(parents=True)
    catalog.close()
    again = Catalog.open(tmp_path)
    assert not again.directory(made).parent.exists()
    again.close()


def test_a_link_in_place_of_the_directory_is_not_followed(catalog, tmp_path):
    made = catalog.create("docs", SPEC)
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "gold").write_text("x")
    (tmp_path / made.uid).symlink_to(treasure)
    catalog.delete("docs")
    catalog.remove_deleted()
    assert (treasure / "gold").exists()
    assert not (tmp_path / made.uid).is_symlink()


def test_a_damaged_catalogue_is_named(tmp_path):
    catalog = Catalog.open(tmp_path)
    catalog.create("docs", SPEC)
    catalog.close()
    path = tmp_path / FILE_NAME
    path.write_bytes(b"x" * 4096 + path.read_bytes()[4096:])
    with pytest.raises(CorruptManifest, match="catalog"):
        Catalog.open(tmp_path)


def flip_in_record(path, uid):
    """Another bit in what the catalogue keeps of a collection, past SQLite's own checks."""
    data = path.read_bytes()
    at = data.index(b"space", data.index(uid.encode()))
    path.write_bytes(data[: at + 6] + bytes([data[at + 6] ^ 1]) + data[at + 7 :])


def test_a_catalogue_with_a_flipped_bit_is_not_believed(tmp_path):
    catalog = Catalog.open(tmp_path)
    made = catalog.create("docs", SPEC)
    catalog.close()
    flip_in_record(tmp_path / FILE_NAME, made.uid)
    with pytest.raises(CorruptManifest, match="do not match"):
        Catalog.open(tmp_path)


def test_a_catalogue_that_went_back_is_not_believed(tmp_path):
    """Neither one whose last change is gone with its log, nor one that is empty."""
    catalog = Catalog.open(tmp_path)
    catalog.create("docs", SPEC)
    catalog.close()
    before = (tmp_path / FILE_NAME).read_bytes()
    catalog = Catalog.open(tmp_path)
    catalog.create("more", SPEC)
    catalog.close()
    (tmp_path / FILE_NAME).write_bytes(before)
    with pytest.raises(CorruptManifest, match="generation"):
        Catalog.open(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"")
    with pytest.raises(CorruptManifest, match="gone"):
        Catalog.open(tmp_path)


def test_a_catalogue_without_its_mark_is_taken_as_it_is(tmp_path):
    catalog = Catalog.open(tmp_path)
    catalog.create("docs", SPEC)
    catalog.close()
    (tmp_path / FILE_NAME).with_suffix(".mark").write_bytes(b"damaged")
    again = Catalog.open(tmp_path)
    assert [c.name for c in again.list()] == ["docs"]
    again.create("more", SPEC)
    again.close()
    Catalog.open(tmp_path).close()


def test_a_writer_that_lost_its_lease_changes_nothing(tmp_path):
    frozen = Catalog.open(tmp_path, token=1)
    frozen.create("docs", SPEC)
    heir = Catalog.open(tmp_path, token=2)
    heir.delete("docs")
    again = heir.create("docs", SPEC)  # the same name, another collection
    for change in (
        lambda: frozen.delete("docs"),
        lambda: frozen.create("more", SPEC),
        frozen.check_writer,
        lambda: Catalog.open(tmp_path, token=1),
    ):
        with pytest.raises(StaleWriter):
            change()
    heir.check_writer()
    assert heir.list() == [again]
    frozen.close()
    heir.close()
    third = Catalog.open(tmp_path, token=3)  # all is sealed as it should be
    assert third.list() == [again]
    third.close()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"one INTEGER PRIMARY KEY", b"one INTEGER PRIMARX KEY"),
        (b"UNIQUE (tenant, name)", b"UNIQUE (tenant, uid!)"),
        (b"books", b"boo\xffs"),
    ],
)
def test_damaged_tables_and_texts_are_noticed(tmp_path, old, new):
    catalog = Catalog.open(tmp_path)
    catalog.create("books", SPEC)
    catalog.close()
    path = tmp_path / FILE_NAME
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    with pytest.raises(CorruptManifest, match="catalog"):
        Catalog.open(tmp_path)
