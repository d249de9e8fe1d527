"""A plot of the report is one function; what the package needs for the page is in it."""

from importlib.resources import files

from matplotlib.figure import Figure

from apoptosis.decide.log import EventLog
from apoptosis.tools.report import figures, write_report


def test_one_function_adds_a_plot(tmp_path):
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append("epoch", method="apoptosis", seed=0, epoch=1, step=10, seconds=1.0, loss=0.5, metric=0.9)

    @figures.plot("epochs-drawn", "A <new> plot", "Losses.")
    def draw(run):
        if len(run.curves) != 1:
            return "There is no such run."
        fig = Figure()
        fig.add_subplot().plot(*run.curves[0].points("epoch", "loss"))
        return figures.Drawn(fig, "One loss.", " More words.")

    @figures.plot("never-drawn", "Another", "Nothing.")
    def none(run):
        return "The log holds <nothing> of that kind."

    try:
        page = write_report(tmp_path).read_text()
    finally:
        del figures.PLOTS["epochs-drawn"], figures.PLOTS["never-drawn"]
    assert (tmp_path / "plots" / "epochs-drawn.png").read_bytes().startswith(b"\x89PNG")
    assert '<h2 id="h-epochs-drawn">A &lt;new&gt; plot</h2>' in page
    assert '<div class="panels" role="img" aria-label="One loss.">' in page
    assert "<figcaption>Losses. More words.</figcaption>" in page
    assert "The log holds &lt;nothing&gt; of that kind." in page
    assert not (tmp_path / "plots" / "never-drawn.png").exists()


def test_templates_are_files_of_the_package():
    found = {path.name for path in (files("apoptosis.tools.report") / "templates").iterdir()}
    assert found == {"macros.html", "report.html", "style.css"}
