"""One LightningModule per objective; what to log beside it lives in `callbacks`."""
