//! Stages 2 and 4: MoRI-EP dispatch and combine
