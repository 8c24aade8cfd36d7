"""What the configurations of all stages share."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

AxisName = Literal["perceived_gender", "perceived_race", "perceived_skin_tone", "perceived_age", "perceived_couple"]
Share = Annotated[float, Field(ge=0, le=1)]


class StageConfig(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
