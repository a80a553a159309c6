import torch

from tutorials.assemble.classifier import accuracy_on_real, classified, trained
from tutorials.pictures import mnist


def test_it_knows_real_digits(tmp_path):
    torch.set_default_dtype(torch.float32)  # half the time
    network = trained(200, path=tmp_path / "a.pt")
    found = accuracy_on_real(network)
    assert found > 0.85  # a tenth by chance; 60 steps give about .8
    images, labels = mnist("validation")
    again = trained(200, path=tmp_path / "a.pt")  # read, not trained
    right = (classified(again, images[:, None]) == labels).double().mean()
    assert float(right) > 0.85
