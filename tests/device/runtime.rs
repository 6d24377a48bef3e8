//! Memory, streams, events, graphs, and what the driver refuses.

use fused_moe_core::{DType, DeviceAllocator, ErrorKind, ViewError, Workspace};
use libtest_mimic::Failed;

use crate::{Gpu, OnGpu};

pub const TESTS: [(&str, OnGpu); 6] = [
    ("memory_holds_what_is_written", memory),
    ("streams_wait_for_events", streams),
    ("graphs_do_it_again_with_new_inputs", graphs),
    ("a_failed_capture_leaves_the_stream_usable", failed_capture),
    ("bad_objects_are_errors", bad_objects),
    ("workspaces_lie_in_its_memory", workspaces),
];

fn check(holds: bool, what: &str) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(what.into()) }
}

fn memory(gpu: &Gpu) -> Result<(), Failed> {
    let bytes: Vec<u8> = (0..10_001).map(|_| rand::random()).collect();
    let mut one = gpu.runtime.alloc(bytes.len())?;
    let mut other = gpu.runtime.alloc(bytes.len())?;
    let stream = gpu.runtime.stream()?;
    one.write(&bytes)?;
    other.fill(0xaa, &stream)?;
    stream.wait()?;
    let mut read = vec![0; bytes.len()];
    other.read(&mut read)?;
    check(read.iter().all(|&byte| byte == 0xaa), "fill")?;
    other.copy_from(&one, &stream)?;
    stream.wait()?;
    other.read(&mut read)?;
    check(read == bytes, "copy")?;
    check(one.address() % 256 == 0, "alignment")?;
    check(gpu.runtime.alloc(usize::MAX / 2).is_err(), "more memory than there is")
}

fn streams(gpu: &Gpu) -> Result<(), Failed> {
    let (first, second) = (gpu.runtime.stream()?, gpu.runtime.stream()?);
    let (mut start, mut done) = (gpu.runtime.event()?, gpu.runtime.event()?);
    let mut buffer = gpu.runtime.alloc(256 << 20)?;
    start.record(&first)?;
    buffer.fill(1, &first)?;
    buffer.fill(2, &first)?;
    done.record(&first)?;
    second.wait_for(&done)?;
    buffer.fill(3, &second)?;
    second.wait()?;
    let mut read = vec![0; buffer.bytes()];
    buffer.read(&mut read)?;
    check(read.iter().all(|&byte| byte == 3), "the second stream did not wait")?;
    check(done.elapsed(&start)?.as_nanos() > 0, "two fills took no time")
}

fn graphs(gpu: &Gpu) -> Result<(), Failed> {
    let stream = gpu.runtime.stream()?;
    let (mut from, mut to) = (gpu.runtime.alloc(4096)?, gpu.runtime.alloc(4096)?);
    let graph = stream.capture(|stream| to.copy_from(&from, stream))?;
    for byte in [7, 9] {
        from.write(&[byte; 4096])?;
        // SAFETY: both buffers are still there.
        unsafe { graph.replay(&stream)? };
        stream.wait()?;
        let mut read = [0; 4096];
        to.read(&mut read)?;
        check(read == [byte; 4096], "replay did not see the new input")?;
    }
    Ok(())
}

fn failed_capture(gpu: &Gpu) -> Result<(), Failed> {
    let stream = gpu.runtime.stream()?;
    let mut buffer = gpu.runtime.alloc(64)?;
    let failed = stream.capture(|stream| {
        buffer.fill(1, stream)?;
        Err(Failed::from("on purpose"))
    });
    check(failed.is_err(), "a failing body gave a graph")?;
    buffer.fill(2, &stream)?;
    stream.wait()?;
    let mut read = [0; 64];
    buffer.read(&mut read)?;
    check(read == [2; 64], "the stream does not work any more")
}

fn bad_objects(gpu: &Gpu) -> Result<(), Failed> {
    let error = gpu.runtime.load(b"not an object").err().ok_or("text was loaded")?;
    check(error.to_string().contains("13 bytes that are no ELF object"), &error.to_string())?;
    let image = moe_kernels::object(gpu.kernels.arch(), "quantize_1x128")?;
    let error = gpu.runtime.load(image)?.kernel("no_such_kernel").err().ok_or("found what is not there")?;
    check(error.call == "cuModuleGetFunction", &error.to_string())
}

fn workspaces(gpu: &Gpu) -> Result<(), Failed> {
    let device = gpu.runtime.device();
    let mut workspace = Workspace::on(&gpu.runtime, 1000)?;
    check(workspace.bytes() == 1024 && workspace.device() == device, "size and place")?;
    let mut arena = workspace.arena();
    let first = arena.take_tensor(DType::F32, &[3, 5])?;
    let second = arena.take_tensor(DType::U8, &[1])?;
    let (first, second) = (first.into_view(), second.into_view());
    check(second.address() - first.address() == 256 && first.address() % 256 == 0, "pieces")?;
    check(first.device() == device, "device of a piece")?;
    let refused = matches!(first.as_slice::<f32>(), Err(ViewError::NotHost { .. }));
    check(refused, "memory of the device was read on the host")?;
    let memory = gpu.runtime.alloc_zeroed(0)?;
    check(memory.address() % 256 == 0, "an allocation of nothing")?;
    let too_much = Workspace::on(&gpu.runtime, usize::MAX / 2).err().ok_or("more memory than there is")?;
    check(matches!(too_much.kind, ErrorKind::OutOfMemory { .. }), &too_much.to_string())
}
