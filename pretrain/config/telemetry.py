"""Config section `telemetry`: measurements of the MLP neurons."""

from pretrain.config.base import EXECUTION, Section
from pretrain.config.fields import PositiveInt


class TelemetryConfig(Section):
    """Measurements of the MLP neurons, see `pretrain.neurons.telemetry`. They do not change the training."""

    key_class = EXECUTION

    every_steps: PositiveInt | None = None
    """Measure every n steps, at `reference_step` and at the end; null: never. A measurement costs a QR factorisation
    in fp64 of each MLP matrix and a forward pass. Between measurements, telemetry keeps an fp32 average of these
    matrices' gradients."""

    reference_step: PositiveInt = 500
    """The step whose dead neurons are followed: `dead_forever` is the share of them that never came back."""

    activation_sequences: PositiveInt = 16
    """Sequences (not tokens) of the validation split over which activations are averaged, rounded up to whole
    validation batches."""

    def ineffective(self) -> dict[str, str]:
        """Return every option but `every_steps` if nothing is measured."""
        fields = ("reference_step", "activation_sequences") if self.every_steps is None else ()
        return dict.fromkeys(fields, "telemetry.every_steps is null, so nothing is measured")
