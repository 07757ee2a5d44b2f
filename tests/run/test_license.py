"""The license of a base model, and the reminder to name that of the trained one."""

import json

import pytest

from fastsd.run.license import license_of
from fastsd.run.model_card import untrained


@pytest.mark.parametrize(
    "card, expected",
    [
        ("---\ntags:\n- a\nlicense: creativeml-openrail-m\n---\ntext", "creativeml-openrail-m"),
        ('---\nlicense: "mit"\n---\nlicense: other', "mit"),
        ("---\ntags: []\n---\nlicense: other", ""),
        ("", ""),
    ],
)
def test_license_is_read_from_the_card_of_a_base(card, expected, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert license_of(str(tmp_path)) == expected
    assert untrained("aligned", str(tmp_path)).license == expected


def test_license_of_a_summary_and_of_a_hub_id(tmp_path):
    (tmp_path / "fastsd.json").write_text(json.dumps({"license": "openrail"}))
    assert license_of(str(tmp_path)) == "openrail"
    assert license_of("stable-diffusion-v1-5/stable-diffusion-v1-5") == "creativeml-openrail-m"
    assert license_of(str(tmp_path / "absent")) == license_of("someone/a-model") == ""
