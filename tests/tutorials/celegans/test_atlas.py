from pathlib import Path

import pytest
import torch

from tutorials.celegans.atlas import Atlas, read_atlas
from tutorials.celegans.connectome import load_connectome


def test_the_connectomes_own_places() -> None:
    connectome = load_connectome()
    of = Atlas.from_connectome(connectome, spread=4.0)
    assert of.names == connectome.names
    assert torch.equal(of.means, connectome.position)
    assert torch.equal(of.covariances[5], 16 * torch.eye(3, dtype=torch.float64))
    assert of.axis.tolist() == [0, 1, 0]
    # What is found by itself is nearly that.
    assert abs(float(Atlas(of.names, of.means, of.covariances).axis[1])) > 0.99
    with pytest.raises(ValueError, match=r"spread=0\.0: expected a positive finite number"):
        Atlas.from_connectome(connectome, spread=0.0)


HEADS = {
    "sd": ("name,x,y,z,sd", "{},{},{},{},2.0"),
    "full": ("xx,xy,xz,yy,yz,zz,name,x,y,z,red,red_sd", "4,1,0,5,0,6,{},{},{},{},.5,.1"),
}


def atlas_file(path: Path, kind: str, **replace: str) -> Path:
    header, row = HEADS[kind]
    rows = [row.format(name, i, i * i, -i) for i, name in enumerate(["AVAL", "avar", "DA01", "VB10"])]
    text = "\n".join([header, *rows]) + "\n"
    for old, new in replace.items():
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    return path


def test_atlas_files(tmp_path: Path) -> None:
    simple = read_atlas(atlas_file(tmp_path / "a.csv", "sd"))
    assert simple.names == ("AVAL", "AVAR", "DA1", "VB10")
    assert simple.means[2].tolist() == [2, 4, -2]
    assert simple.covariances[1].tolist() == [[4, 0, 0], [0, 4, 0], [0, 0, 4]]
    assert simple.color_means is None
    full = read_atlas(atlas_file(tmp_path / "b.csv", "full"))
    assert full.covariances[1].tolist() == [[4, 1, 0], [1, 5, 0], [0, 0, 6]]
    assert full.channels == ("red",)
    assert full.color_means is not None
    assert full.color_means.tolist() == [[0.5]] * 4
    assert full.color_covariances is not None
    assert float(full.color_covariances[0]) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("kind", "replace", "message"),
    [
        ("sd", {"z,sd": "w,sd"}, r"a\.csv: no column z;"),
        ("full", {"yz": "yw"}, "no column yz"),
        ("full", {"red_sd": "green_sd"}, "colour columns red, green_sd, expected each with its _sd"),
        ("sd", {"avar": "AVAL"}, r"repeated \['AVAL'\]"),
        ("sd", {"2.0": "x"}, "row 2, column 'sd' holds 'x', expected a finite number"),
        ("sd", {"2.0": "0"}, "row 2, column 'sd' holds 0.0, expected a positive number"),
        ("sd", {"2.0": "-2"}, "row 2, column 'sd' holds -2.0, expected a positive number"),
        ("full", {"4,1,0,5": "4,9,0,5"}, r"a\.csv: covariances: that of AVAL is not symmetric and positive definite"),
    ],
)
def test_bad_atlas_files(tmp_path: Path, kind: str, replace: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_atlas(atlas_file(tmp_path / "a.csv", kind, **replace))


def test_atlases_refuse_fields_that_do_not_fit() -> None:
    of = Atlas.from_connectome(load_connectome().subset(range(10)))
    with pytest.raises(ValueError, match="names: 3 neurons"):
        Atlas(of.names[:3], of.means[:3], of.covariances[:3])
    with pytest.raises(ValueError, match=r"means has shape \(9, 3\)"):
        Atlas(of.names, of.means[:9], of.covariances)
    with pytest.raises(ValueError, match="expected both or none"):
        Atlas(of.names, of.means, of.covariances, of.means)
    with pytest.raises(ValueError, match="channels: 2, expected as many"):
        Atlas(of.names, of.means, of.covariances, channels=("a", "b"))
