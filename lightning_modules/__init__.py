"""One LightningModule for each objective; `callbacks` has what else runs during training."""
