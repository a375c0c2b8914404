"""The loss curve of a run, as a picture."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastgpt.metrics import read_metrics


def plot_losses(run: Path) -> Path:
    """Draw `metrics.jsonl` of a run folder into its `loss.png`; return the picture's path."""
    records = read_metrics(run / "metrics.jsonl")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's state alone
    axes = figure.add_subplot(title=run.name, xlabel="step", ylabel="loss (nats per token)")
    for key, label, style in (
        ("loss", "training", {"linewidth": 0.8, "alpha": 0.6}),
        ("val_loss", "validation", {"linewidth": 1.8, "marker": "o", "markersize": 3}),
    ):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.grid(alpha=0.3)
    axes.legend()
    path = run / "loss.png"
    figure.savefig(path, dpi=120)
    return path
