"""stub"""


def takes(*a):
    return False


def takes_backward(*a):
    return False
