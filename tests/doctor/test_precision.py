"""Models in bfloat16, as `tidal.infer --precision bf16` loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.doctor.bugs_decoding import of_another_row_in
from tidal import checkpoint
from tidal.doctor import __main__ as command
from tidal.doctor import run
from tidal.doctor.registry import FLOAT32
from tidal.doctor.specimen import make
from tidal.model import TidalTransformer
from tidal.streams import Batch


@pytest.mark.parametrize("planted", [False, True])
def test_a_checkpoint_is_examined_in_bfloat16(planted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """A bug that is there in this precision only, in a batch only, is found; without it, there is nothing to find."""
    model, tokenizer = make()
    folder = checkpoint.write_checkpoint(tmp_path / "run", 1, tensors=model.state_dict(),
                                         config=model.config.to_dict(), trainer={"step": 1},
                                         tokenizer=tokenizer)  # fmt: skip
    if planted:
        of_another_row_in(torch.bfloat16)(monkeypatch)
    assert command.run([str(folder), "--quick", "--checks", "10", "13", "14", "19", "--precision", "bf16"]) == planted
    said = capsys.readouterr().out
    assert ("bfloat16: max" in said) != planted
    assert said.count("FINDING") == planted
    if not planted:
        assert command.run(["--quick", "--checks", "14", "--precision", "bf16"]) == 0
        assert "bfloat16: max" in capsys.readouterr().out


@pytest.mark.parametrize("error", [-1.0, float("nan")])
def test_a_wrong_training_pass_in_bfloat16_excuses_nothing(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    """Decoding may be twice as far from it as it is from float64, and float64 takes other ways on a GPU."""
    model, tokenizer = make()
    log_probs = TidalTransformer.log_probs

    def wrong(self: TidalTransformer, batch: Batch) -> torch.Tensor:
        right = log_probs(self, batch)
        return right + error if self.unit_embedding.weight.dtype == torch.bfloat16 else right

    monkeypatch.setattr(TidalTransformer, "log_probs", wrong)
    report = run(model.bfloat16(), tokenizer, quick=True, checks=[14])
    assert "the training pass's mean error" in report.findings[0].message


@pytest.mark.parametrize(("scale", "bug", "found"), [(300, False, False), (300, True, True), (1e5, False, True)])
def test_a_model_that_rounds_coarsely_is_no_finding(scale: float, bug: bool, found: bool,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Its logits are so large that float32 cannot tell 1e-4. A bug in float32 still shows, and so does mere noise."""
    model, tokenizer = make()
    model.unit_embedding.weight.data *= scale
    if bug:
        of_another_row_in(torch.float32)(monkeypatch)
    report = run(model, tokenizer, quick=True, checks=[14])
    assert bool(report.findings) == found
    if not found:
        assert report.results[0].limit > FLOAT32
