"""What `jemkit show` computes, receives and draws; none of it needs gradio."""

import asyncio
import base64
import io
import math
import os
import sys
import threading
from collections.abc import MutableMapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import jemkit, one_line
from exported_runs import CPU, averaged_run
from PIL import Image as Pillow
from shown import shown_toy
from torch import Tensor
from toys import Toy, toy_registry

from jemkit import DataError, ModelEnergy, Preempted, run
from jemkit.errors import MisfitError, UsageError
from jemkit.evaluation.export import export
from jemkit.runtime.modes import eval_mode
from jemkit.sampling.kernels import Boxed
from jemkit_cli.show import chains, drawing, looking, received
from jemkit_cli.show.command import bound
from jemkit_cli.show.looking import Image, Reference, View
from jemkit_cli.show.loopback import POLICY, Loopback
from jemkit_cli.show.model import ShownModel, shown_model


@pytest.fixture(scope="module")
def shown() -> ShownModel:
    return shown_toy()


@pytest.fixture(scope="module")
def x(shown: ShownModel) -> Tensor:
    image = looking.image_at(shown, 1)
    assert image is not None
    assert image.label == 1
    return image.x


def missing(*_: object) -> None:
    raise DataError("nowhere")


class TestModel:
    def test_a_run_its_checkpoint_and_its_export_are_the_same_model_also_without_data(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parts = toy_registry()
        run = averaged_run(parts, tmp_path)
        exported = export(run, out=tmp_path / "model", registry=parts).folder
        best = run / "checkpoints" / "best"
        models = [shown_model(path, parts, CPU) for path in (run, best, exported)]
        first = looking.image_at(models[0], 0)
        assert first is not None
        assert len({looking.views(model, first.x)[0].energy for model in models}) == 1
        assert models[0].classes == ("0", "1", "2")
        assert "averaged" in drawing.header(models[0])
        monkeypatch.setattr(Toy, "load", missing)
        for path in (run, exported):
            without = shown_model(path, parts, CPU)
            assert without.test is None
            assert without.untested == "nowhere"
            assert looking.image_at(without, 0) is None
            assert looking.reference_energies(without, 10) is None
            assert chains.generate(without, 1, 2, steps=1).shape == (2, 1, 8, 8)

    def test_nothing_changes_the_model(self, shown: ShownModel, x: Tensor) -> None:
        state = {k: v.clone() for k, v in shown.model.state_dict().items()}
        modes = [module.training for module in shown.model.modules()]
        list(chains.attack(shown, x, 1, radius_px=8, steps=2))
        list(chains.purify(shown, x, steps=2))
        chains.generate(shown, None, 2, steps=2)
        after = shown.model.state_dict()
        assert all(torch.equal(after[k], v) for k, v in state.items())
        assert [module.training for module in shown.model.modules()] == modes
        assert all(p.grad is None and p.requires_grad for p in shown.model.parameters())

    def test_tabs_take_turns_and_one_that_is_left_in_the_middle_blocks_nobody(
        self, shown: ShownModel, x: Tensor
    ) -> None:
        left = chains.attack(shown, x, 1, radius_px=8, steps=5)
        next(left)
        next(left)
        energies: list[float] = []
        threads = [
            threading.Thread(target=lambda: energies.append(looking.views(shown, x)[0].energy))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(energies)) == 1

    def test_the_end_of_the_page_interrupts_a_chain(self, x: Tensor) -> None:
        ended = shown_toy()
        states = chains.purify(ended, x, steps=10**6)
        next(states)
        ended.end()
        with pytest.raises(Preempted):
            list(states)


class TestLooking:
    def test_probabilities_and_energy_are_those_of_the_model_in_eval_mode(
        self, shown: ShownModel, x: Tensor
    ) -> None:
        (view,) = looking.views(shown, x)
        with eval_mode(shown.model), torch.no_grad():
            scores = shown.model.scores(x)
        assert view.energy == float(scores.energy)
        assert torch.allclose(view.probabilities, scores.logits.double().softmax(1)[0])

    def test_the_place_of_an_energy_is_the_share_of_test_images_below_it(self) -> None:
        reference = Reference(torch.tensor([-2.0, -1.0, 0.0, 1.0]).double(), "4 test images")
        assert reference.below(-1.0) == 0.25
        assert reference.below(5.0) == 1.0
        assert math.isnan(reference.below(float("nan")))
        assert math.isnan(Reference(torch.tensor([0.0, math.inf]), "").below(0.0))

    def test_the_next_image_of_a_class_comes_round(self, shown: ShownModel) -> None:
        assert looking.next_of_class(shown, 0, None) == 1
        assert looking.next_of_class(shown, 0, 0) == 3
        assert looking.next_of_class(shown, 9, 0) == 0
        assert looking.next_of_class(shown, 4, 7) == 4  # no image of such a class

    def test_energies_of_a_part_are_stratified(self, shown: ShownModel) -> None:
        reported: list[tuple[str, int, int]] = []
        reference = looking.reference_energies(shown, 6, lambda *now: reported.append(now))
        assert reference is not None
        assert len(reference.values) == 6
        assert "6 of 12, stratified" in reference.text
        assert reported == [("energies of test images", 6, 6)]


class TestChains:
    def test_an_attack_stays_in_its_ball_and_raises_the_loss(
        self, shown: ShownModel, x: Tensor
    ) -> None:
        states = list(chains.attack(shown, x, 1, radius_px=25.5, steps=5))
        assert [state.step for state in states] == [0, 1, 2, 3, 4, 5]
        assert torch.equal(states[0].x, x)
        assert max(float((s.x - x).abs().max()) for s in states) <= 0.1 + 1e-6
        assert states[-1].view.probabilities[1] < states[0].view.probabilities[1]
        for state in states:
            assert state.view.energy == looking.views(shown, state.x)[0].energy

    def test_purification_is_the_models_own_chain_in_eval_mode(
        self, shown: ShownModel, x: Tensor
    ) -> None:
        states = list(chains.purify(shown, x, steps=3, seed=4))
        bounds, rng = shown.model.bounds, shown.generator(4, "purify")
        kernel = Boxed(shown.model.density.sampler, bounds)
        with eval_mode(shown.model):
            energy = ModelEnergy(shown.model.model)
            end = bounds.to_unit(run(kernel, energy, bounds.from_unit(x), rng, 3))
        assert torch.equal(states[-1].x, end.clamp(0, 1))
        assert states[-1].view.energy < states[0].view.energy

    def test_generation_follows_the_seed_and_says_how_far_it_is(self, shown: ShownModel) -> None:
        passes: list[int] = []
        images = chains.generate(shown, 2, 3, steps=4, seed=1, progress=passes.append)
        assert images.shape == (3, 1, 8, 8)
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        assert passes == [1, 2, 3, 4]
        assert torch.equal(images, chains.generate(shown, 2, 3, steps=4, seed=1))
        assert not torch.equal(images, chains.generate(shown, 2, 3, steps=4, seed=2))
        y = torch.full((3,), 2)
        rng = shown.generator(1, "generate")
        assert torch.equal(images, shown.model.sample(3, rng, steps=4, y=y))

    def test_a_classifier_is_attacked_and_its_other_chains_are_refused_with_the_reason(
        self, x: Tensor
    ) -> None:
        classifier = shown_toy("classifier")
        assert len(list(chains.attack(classifier, x, 0, radius_px=8, steps=1))) == 2
        with pytest.raises(MisfitError, match="without a density"):
            next(chains.purify(classifier, x, steps=1))
        with pytest.raises(MisfitError, match="without a density"):
            chains.generate(classifier, 0, 1, steps=1)
        assert "without a density" in classifier.unsampled


def saved(path: Path, image: Pillow.Image, kind: str = "PNG", **more: Any) -> Path:
    image.save(path, kind, **more)
    return path


class TestReceived:
    def test_a_file_becomes_an_image_of_the_models_size(self, tmp_path: Path) -> None:
        wide = Pillow.new("RGB", (40, 20), "white")
        wide.paste((255, 0, 0), (10, 0, 30, 20))  # the centre square
        path = saved(tmp_path / "image", wide, "BMP")
        red = received.file_image(path, (3, 4, 4))
        assert torch.equal(red, torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 4, 4))
        assert received.file_image(path, (1, 8, 8)).shape == (1, 1, 8, 8)
        clear = Pillow.new("RGBA", (9, 9), (0, 0, 0, 0))
        assert float(received.file_image(saved(path, clear), (1, 8, 8)).min()) == 1.0

    @pytest.mark.parametrize("kind", ["TIFF", "EPS", "PPM"])
    def test_only_common_formats_are_decoded(self, kind: str, tmp_path: Path) -> None:
        path = saved(tmp_path / "image.png", Pillow.new("RGB", (8, 8)), kind)
        with pytest.raises(DataError, match="expected PNG, JPEG"):
            received.file_image(path, (1, 8, 8))

    def test_large_and_damaged_files_are_refused(self, tmp_path: Path) -> None:
        path, buffer = tmp_path / "image.png", io.BytesIO()
        path.write_bytes(bytes(received.LARGEST + 1))
        with pytest.raises(DataError, match="bytes"):
            received.file_image(path, (1, 8, 8))
        Pillow.new("1", (8000, 8000)).save(buffer, "PNG")  # small as a file
        path.write_bytes(buffer.getvalue())
        with pytest.raises(DataError, match="8000 x 8000 px"):
            received.file_image(path, (1, 8, 8))
        path.write_bytes(buffer.getvalue()[:60])
        with pytest.raises(DataError):
            received.file_image(path, (1, 8, 8))
        os.mkfifo(fifo := tmp_path / "fifo")
        with pytest.raises(DataError, match="regular"):
            received.file_image(fifo, (1, 8, 8))

    def test_a_drawing_is_its_bytes_and_nothing_else(self) -> None:
        pixels = "ff0080" + "00" * 9
        colour = received.drawn_image(pixels, (3, 2, 2))
        assert colour[0, :, 0, 0].tolist() == pytest.approx([1, 0, 128 / 255])
        assert float(received.drawn_image(pixels, (1, 2, 2))[0, 0, 0, 0]) == pytest.approx(
            383 / 765
        )
        for text in ("", pixels[:-2], pixels + "00", "zz" * 12, "é" * 24, " " * 24):
            with pytest.raises(DataError, match="hexadecimal"):
                received.drawn_image(text, (3, 2, 2))


class TestDrawing:
    def test_names_are_text_and_numbers_that_are_not_finite_are_shown(self, x: Tensor) -> None:
        names = ("<script>", "b", "c")
        odd = shown_toy(classes=names, about={"run": "<i>"})
        image = Image(x, 0, "test image 1")
        view = View(torch.tensor([math.nan, 0.5, 0.5]).double(), math.nan)
        reference = Reference(torch.tensor([-1.0, 0.0, 2.0]).double(), "3 test images")
        page = drawing.header(odd) + drawing.looked_at(odd, image, view, reference)
        assert "<script>" not in page
        assert "&lt;script&gt;" in page
        assert "<i>" not in drawing.header(odd)
        assert "E(x) = nan" in page
        state = chains.State(0, x, view)
        assert "nan" in drawing.before_and_after(odd, [state, state], 0, reference, steps=1)
        captions = drawing.generated(odd, image.x, [view], reference)
        assert "<span>E(x) = nan</span>" in captions  # on a line of its own
        broken = Reference(torch.tensor([math.nan]), "1 test image")
        assert "no histogram" in drawing.histogram(broken, [("E", 0.0)])

    def test_an_image_is_drawn_pixel_by_pixel_in_its_colours(self) -> None:
        for shape in ((1, 1, 5, 7), (1, 3, 5, 7)):
            x = (torch.arange(35.0) / 35).view(1, 1, 5, 7).expand(shape)
            code = drawing.pixels(x, "a & b").partition("base64,")[2].partition('"')[0]
            array = np.asarray(Pillow.open(io.BytesIO(base64.b64decode(code))))
            assert array.shape == ((5, 7) if shape[1] == 1 else (5, 7, 3))
            back = torch.tensor(array).view(5, 7, -1)[:, :, -1] / 255
            assert torch.allclose(back, x[0, -1], atol=1 / 255)

    def test_of_many_classes_the_most_probable_are_listed(self, shown: ShownModel) -> None:
        many = shown_toy(classes=tuple(f"class{i}" for i in range(100)))
        p = torch.arange(100).double() / 4950
        listed = drawing.bars(many, View(p, 0.0))
        assert listed.count('class="bar"') == 10
        assert "class99" in listed
        assert "10 highest of 100" in listed


def answered(headers: dict[str, str]) -> tuple[int, dict[str, str]]:
    """The status of a request to the server around a page that says yes, and its headers."""
    sent: list[MutableMapping[str, Any]] = []

    async def page(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    pairs = [(k.encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "headers": pairs}
    asyncio.run(Loopback(page, 7860)(scope, lambda: None, send))  # type: ignore[arg-type]
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}


class TestServer:
    def test_requests_of_other_hosts_and_pages_and_large_ones_are_refused(self) -> None:
        status, headers = answered({"host": "127.0.0.1:7860", "origin": "http://localhost:7860"})
        assert status == 200
        assert headers["content-security-policy"] == POLICY
        assert answered({"host": "localhost:7860"})[0] == 200
        assert answered({})[0] == 403
        assert answered({"host": "evil.example:7860"})[0] == 403
        for origin in ("http://evil.example", "null", "https://127.0.0.1:7860"):
            assert answered({"host": "127.0.0.1:7860", "origin": origin})[0] == 403
        large = {"host": "127.0.0.1:7860", "content-length": str(2 * received.LARGEST)}
        assert answered(large)[0] == 413

    def test_a_port_in_use_is_named_and_zero_takes_a_free_one(self) -> None:
        with bound(0) as first:
            address, port = first.getsockname()
            assert address == "127.0.0.1"
            with pytest.raises(UsageError, match=f"port {port} on 127.0.0.1 is in use"):
                bound(port)

    def test_without_gradio_one_message_names_the_extra_before_any_work(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "gradio", None)
        message = one_line(jemkit("show", "nowhere"), 3)
        assert "needs the package gradio" in message
        assert "[show]" in message

    def test_a_folder_named_gradio_is_not_the_package(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = ModuleSpec("gradio", None)
        monkeypatch.setattr("jemkit_cli.show.command.find_spec", lambda name: folder)
        assert "needs the package gradio" in one_line(jemkit("show", "nowhere"), 3)
