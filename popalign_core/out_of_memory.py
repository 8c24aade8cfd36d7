"""What runs out of a device's memory, and says so in many ways."""

# cuBLAS and cuDNN take memory of their own, beside torch's, and tell it by their own codes; so does the driver.
_TEXTS = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_..., ..._HOST_...
    "Unable to find a valid cuDNN algorithm",
    "unable to find an engine to execute this computation",  # so cuDNN says where no engine's workspace fits
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less at once may help: an error of torch's allocators, of a library or of the driver."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size  # pyright: ignore[reportMissingTypeStubs]

    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(text in str(error) for text in _TEXTS)
