"""The loader's batches are functions of the step: any workers, any split over processes, any point of resume."""

from __future__ import annotations

import io
import os
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hybrid_ssl.data.loader import Broken, Loader
from hybrid_ssl.data.settings import BlockMask, DataSettings, JitterSettings, RandomMask, ViewSettings
from hybrid_ssl.data.sources import Images, open_named
from hybrid_ssl.plan import Batch

VIEWS = {
    "global": ViewSettings(size=16, crops=2, jitter=JitterSettings(), gray=0.2, blur=[1.0, 0.1], solarize=[0.0, 0.2]),
    "local": ViewSettings(size=8, crops=3, scale=[0.05, 0.4], jitter=JitterSettings(), blur=0.5),
}
MASKS = {
    "block": BlockMask(kind="block", view="global", p=0.5, min_tokens=1),
    "random": RandomMask(kind="random", view="local", ratio=0.5),
}
GRIDS = {"global": (4, 4), "local": (2, 2)}


def write_images(root: Path, count: int, same: bool = False) -> None:
    for i in range(count):
        rng = torch.Generator().manual_seed(0 if same else i)
        pixels = torch.randint(0, 255, (4, 5, 3), generator=rng).to(torch.uint8)
        picture = Image.fromarray(pixels.numpy()).resize((30 + (not same) * i % 7, 24), Image.Resampling.BICUBIC)
        folder = root / ("even" if i % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{i:03d}.{'png' if i % 3 else 'jpg'}")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Images:
    root = tmp_path_factory.mktemp("images")
    write_images(root, 40)
    return open_named(str(root))


def load(source: Images, **changes: Any) -> Loader:
    data = DataSettings(source="-", **{k: changes.pop(k) for k in ("max_broken", "jitter") if k in changes})
    options: dict[str, Any] = {"views": VIEWS, "masks": MASKS, "grids": GRIDS, "stride": 4, "batch_size": 16, "seed": 1}
    return Loader(source, data, **(options | changes))


def take(loader: Loader, count: int, step: int = 0) -> list[Batch]:
    return list(islice(loader.iterate(step), count))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(equal, a, b))


def test_batch_has_everything_in_its_place(source: Images) -> None:
    batch = take(load(source), 1)[0]
    assert batch.views["global"].shape == (2 * 16, 3, 16, 16) and batch.views["local"].shape == (3 * 16, 3, 8, 8)
    assert {view.dtype for view in batch.views.values()} == {torch.uint8}
    assert batch.masks["block"].shape == (2 * 16, 16) and batch.masks["random"].shape == (3 * 16, 4)
    assert batch.labels is not None and batch.ids is not None and batch.hidden is not None and source.labels is not None
    assert torch.equal(batch.labels, source.labels[batch.ids])
    for name, mask in batch.masks.items():
        assert torch.equal(batch.hidden[name], mask.flatten().nonzero().squeeze(1))


def test_preview_is_the_beginning_of_the_first_batch(source: Images) -> None:
    few, whole = load(source, workers=1).preview(3), take(load(source), 1)[0]
    assert torch.equal(few.views["global"].unflatten(0, (-1, 3)), whole.views["global"].unflatten(0, (-1, 16))[:, :3])


def test_rows_are_view_major(source: Images) -> None:
    loader = load(source)
    batch = take(loader, 1)[0]
    assert batch.ids is not None
    for b in (0, 7):
        i = int(batch.ids[b])
        alone = loader.samples.views(loader.samples.decoder(source.read(i)[0]), 1, 0, i)
        assert all(torch.equal(batch.views[name].unflatten(0, (-1, 16))[:, b], crops) for name, crops in alone.items())


def test_workers_change_no_bit(source: Images) -> None:
    alone = take(load(source), 6)
    for workers in (1, 2):
        assert equal(take(load(source, workers=workers), 6), alone)


def test_threads_change_no_bit(source: Images) -> None:
    before = torch.get_num_threads()
    big = {"global": VIEWS["global"].model_copy(update={"size": 224, "crops": 2}), "local": VIEWS["local"]}
    options = {"views": big, "grids": {"global": (56, 56), "local": (2, 2)}, "batch_size": 2}
    try:
        torch.set_num_threads(1)
        alone = take(load(source, **options), 2)
        torch.set_num_threads(2)
        assert equal(take(load(source, **options), 2), alone) and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_resume_in_the_middle_of_an_epoch_continues_to_the_bit(source: Images, step: int) -> None:
    assert equal(take(load(source, workers=2), 3, step), take(load(source), step + 3)[step:])


def test_two_processes_see_the_batches_of_one(source: Images) -> None:
    whole = take(load(source), 3)
    parts = [take(load(source, world=2, rank=rank, micro_batch=4), 6) for rank in (0, 1)]
    assert load(source, world=2, micro_batch=4).accumulation == 2
    for step, batch in enumerate(whole):
        pieces = [parts[rank][2 * step + micro] for micro in (0, 1) for rank in (0, 1)]
        for name, view in batch.views.items():
            split = [piece.views[name].unflatten(0, (-1, 4)) for piece in pieces]
            assert torch.equal(torch.cat(split, 1).flatten(0, 1), view)
        for name, mask in batch.masks.items():
            split = [piece.masks[name].unflatten(0, (-1, 4)) for piece in pieces]
            assert torch.equal(torch.cat(split, 1).flatten(0, 1), mask)
        assert torch.equal(torch.cat([piece.ids for piece in pieces]), batch.ids)


def test_a_stratified_mask_counts_over_the_whole_step(source: Images) -> None:
    masks = {"block": BlockMask(kind="block", view="global", p=0.5, min_tokens=1, stratified=True)}
    whole = take(load(source, masks=masks), 3)
    for batch in whole:
        shares = batch.masks["block"].float().mean(1)
        assert (shares > 0).sum() == 16 and shares.max() > 0.4  # of 2 x 16 crops
    assert not torch.equal(whole[0].masks["block"].any(1), whole[1].masks["block"].any(1))
    split = {"masks": masks, "world": 2, "micro_batch": 4}
    parts = [take(load(source, rank=rank, **split), 6) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        pieces = [parts[rank][2 * step + micro].masks["block"] for micro in (0, 1) for rank in (0, 1)]
        joined = torch.cat([piece.unflatten(0, (-1, 4)) for piece in pieces], 1).flatten(0, 1)
        assert torch.equal(joined, batch.masks["block"])


def test_identical_pictures_never_share_an_augmentation(tmp_path: Path) -> None:
    for i in range(16):
        Image.linear_gradient("L").resize((40, 40)).convert("RGB").save(tmp_path / f"{i:02d}.png")
    views = {"global": VIEWS["global"]}
    loader = load(open_named(str(tmp_path)), views=views, masks={}, workers=2)
    crops = [crop.numpy().tobytes() for batch in take(loader, 3) for crop in batch.views["global"]]
    assert len(set(crops)) == len(crops) == 3 * 2 * 16


def test_epochs_hold_every_image_once_and_differ(source: Images) -> None:
    batches = take(load(source, batch_size=8), 10)
    first, second = (torch.cat([b.ids for b in part]).tolist() for part in (batches[:5], batches[5:]))  # type: ignore[arg-type]
    assert sorted(first) == sorted(second) == list(range(40)) and first != second


def test_mask_starts_when_it_should(source: Images) -> None:
    masks = {"block": BlockMask(kind="block", view="global", min_tokens=1, start="2 epochs")}
    batches = take(load(source, masks=masks, workers=1), 6)
    assert [bool(batch.masks["block"].any()) for batch in batches] == [False] * 4 + [True] * 2
    share = {"block": masks["block"].model_copy(update={"start": "50%"})}
    assert not take(load(source, masks=share, total_steps=10), 1, 4)[0].masks["block"].any()
    assert take(load(source, masks=share, total_steps=10), 1, 5)[0].masks["block"].any()


def broken_folder(root: Path) -> Images:
    write_images(root, 40)
    (root / "even" / "004.png").write_bytes(b"not an image")
    data = (root / "odd" / "003.jpg").read_bytes()
    (root / "odd" / "003.jpg").write_bytes(data[: len(data) // 2])
    return open_named(str(root))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_named_once_and_replaced(tmp_path: Path, workers: int) -> None:
    source, seen = broken_folder(tmp_path), list[Broken]()
    loader = load(source, workers=workers, max_broken=0.1, on_broken=seen.append)
    batches = take(loader, 10)
    assert sorted(Path(image.name).name for image in seen) == ["003.jpg", "004.png"] and len(loader.broken) == 2
    assert all(image.reason for image in seen)
    ids = {int(i) for batch in batches for i in batch.ids}  # type: ignore[union-attr]
    assert not ids & loader.broken.keys()
    assert all(batch.views["global"].shape[0] == 32 for batch in batches)


def test_replacements_are_the_same_with_any_workers_and_after_resume(tmp_path: Path) -> None:
    source = broken_folder(tmp_path)
    alone = take(load(source, max_broken=0.1), 8)
    assert equal(take(load(source, max_broken=0.1, workers=2), 8), alone)
    assert equal(take(load(source, max_broken=0.1), 3, 5), alone[5:])


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_images_stop_the_run(tmp_path: Path, workers: int) -> None:
    with pytest.raises(
        ValueError, match=r"2 of 40 images are broken, more than data.max_broken=0.04: .*00[34].*cannot|no image"
    ):
        take(load(broken_folder(tmp_path), workers=workers, max_broken=0.04), 10)


@pytest.mark.parametrize("workers", [0, 1])
def test_only_broken_images_end_with_their_reason(tmp_path: Path, workers: int) -> None:
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="the file is empty"):
        take(load(open_named(str(tmp_path)), workers=workers, max_broken=1.0), 1)


def test_images_that_vanish_count_as_broken(tmp_path: Path) -> None:
    write_images(tmp_path, 40)
    source = open_named(str(tmp_path))
    (tmp_path / "even" / "000.jpg").unlink()
    loader = load(source, max_broken=0.1)
    take(loader, 3)
    assert [image.reason for image in loader.broken.values()] == ["cannot be read: No such file or directory"]


class Buggy(Images):
    def __len__(self) -> int:
        return 40

    def read(self, i: int) -> tuple[Any, int | None]:
        raise ZeroDivisionError("a bug in here")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_surfaces_with_its_place(workers: int) -> None:
    with pytest.raises(RuntimeError, match="a batch could not be built(.|\n)*test_loader.py(.|\n)*a bug in here"):
        take(load(Buggy(), workers=workers), 1)


class Deadly(Images):
    """Kills the process that reads image 7, the first time or always."""

    def __init__(self, source: Images, mark: Path, always: bool) -> None:
        self.source, self.mark, self.always = source, mark, always

    def __len__(self) -> int:
        return len(self.source)

    def read(self, i: int) -> tuple[Any, int | None]:
        if i == 7 and (self.always or not self.mark.exists()):
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.read(i)


def test_a_killed_worker_is_replaced_without_a_trace(
    source: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(waiting, "__defaults__", (0.2,))  # looks for the dead every 5 s otherwise
    deadly = Deadly(source, tmp_path / "mark", always=False)
    options = {"micro_batch": 4, "workers": 2}
    assert equal(take(load(deadly, **options), 16), take(load(source, micro_batch=4), 16)) and deadly.mark.exists()
    with pytest.raises(RuntimeError, match="died 4 times in a row at step 0"):
        take(load(Deadly(source, tmp_path / "mark", always=True), batch_size=40, micro_batch=8, workers=1), 8)


def test_small_pictures_are_decoded_once(source: Images) -> None:
    loader = load(source)
    take(loader, 20)
    assert set(loader.samples._kept) == set(range(40))


def test_labels_are_optional(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "PNG")
    for i in range(16):
        (tmp_path / f"{i}.png").write_bytes(buffer.getvalue())
    assert take(load(open_named(str(tmp_path))), 1)[0].labels is None


def test_what_does_not_fit_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="multiple of 10"):
        load(Buggy(), batch_size=16, micro_batch=5, world=2)
    with pytest.raises(ValueError, match="40 images"):
        load(Buggy(), batch_size=64)
    with pytest.raises(ValueError, match="stride of 4"):
        load(Buggy(), masks={"m": RandomMask(kind="random", view="global", ratio=0.5, unit=6)})
