import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from nbutils import plots

mpl.use("agg")


@pytest.fixture
def ax():
    plots.use_style()
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)
