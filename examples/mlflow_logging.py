"""Logging a run to MLflow and TensorBoard.

    python examples/mlflow_logging.py [--quick] [--folder runs/mlflow]

Any function of values and step is a recorder; this one writes to MLflow's local file store, which
``mlflow ui`` shows. Needs scikit-learn and mlflow (or mlflow-skinny).
"""

import argparse
import os
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import selftune as st

os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions prefer a database
import mlflow

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="a short run of two epochs")
parser.add_argument("--folder", default="runs/mlflow")
args = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
data = TensorDataset(images, torch.tensor(digits.target))
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
tuner = st.Tuner(model, nn.CrossEntropyLoss())

mlflow.set_tracking_uri(Path(args.folder).resolve().as_uri())
with mlflow.start_run() as run:
    mlflow.log_params({"model": "MLP 64-128-10", "rule": "AdamW"})
    result = tuner.fit(
        DataLoader(data, 64, shuffle=True),
        val=0.2,
        epochs=2 if args.quick else 20,
        log_dir=f"{args.folder}-tensorboard",
        recorder=lambda values, step: mlflow.log_metrics(values, step),
        log_every=10,
        progress=False,
    )
    mlflow.log_metrics({f"end/{name}": value for name, value in result.hparams.items()})
    mlflow.log_text(result.report(), "report.txt")

course = mlflow.MlflowClient().get_metric_history(run.info.run_id, "hyper/lr")
print(result.report())
print(f"\nMLflow holds {len(course)} values of hyper/lr, the last {course[-1].value:.3g}")
