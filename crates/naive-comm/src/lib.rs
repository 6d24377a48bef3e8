//! Stages 2 and 4: local, naive and allgather_reducescatter dispatch and combine
