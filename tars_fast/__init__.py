from tars_fast.threads import bound_spinning

# Before any module of the package loads torch.
bound_spinning()
