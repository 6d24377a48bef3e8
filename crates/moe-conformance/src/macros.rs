//! One line per backend, one test per case.

/// Tests a prepare/finalize provider: one `#[test]` per case in a module, and one more, `floor`, that at least so
/// many of them pass.
///
/// The name of the module may be left out, it is `conformance` then. `seed = N` repeats a run whose seed a failure
/// printed. `except = [case: "reason"]` counts cases as refused.
///
/// ```
/// moe_conformance::conformance_comm!(moe_conformance::reference::BatchedComm, floor: 18);
/// moe_conformance::conformance_comm!(again, moe_conformance::reference::BatchedComm, floor = 18, seed = 0x2a);
/// moe_conformance::conformance_comm!(
///     reference,
///     moe_conformance::reference::ReferenceComm,
///     floor = 78,
///     except = [traffic_none_ep2: "moves its rows in collectives, which transports do not count"]
/// );
/// ```
#[macro_export]
macro_rules! conformance_comm {
    ($($suite:tt)*) => { $crate::__conformance! { comm __comm_cases $($suite)* } };
}

/// Tests a provider of modular experts; otherwise as [`conformance_comm!`](crate::conformance_comm).
///
/// ```
/// moe_conformance::conformance_experts!(reference, moe_conformance::reference::ReferenceExperts, floor = 50);
/// ```
#[macro_export]
macro_rules! conformance_experts {
    ($($suite:tt)*) => { $crate::__conformance! { experts __experts_cases $($suite)* } };
}

/// Tests a provider of monolithic experts; otherwise as [`conformance_comm!`](crate::conformance_comm).
///
/// ```
/// moe_conformance::conformance_monolithic!(moe_conformance::reference::MonolithicExperts, floor: 30);
/// ```
#[macro_export]
macro_rules! conformance_monolithic {
    ($($suite:tt)*) => { $crate::__conformance! { monolithic __monolithic_cases $($suite)* } };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __conformance {
    ($make:ident $cases:ident $provider:expr, floor: $floor:expr $(,)?) => {
        $crate::__conformance! { @ $make $cases conformance, $provider, $floor, $crate::Settings::default(), [] }
    };
    ($make:ident $cases:ident $name:ident, $provider:expr, floor = $floor:expr $(,)?) => {
        $crate::__conformance! { @ $make $cases $name, $provider, $floor, $crate::Settings::default(), [] }
    };
    ($make:ident $cases:ident $name:ident, $provider:expr, floor = $floor:expr, seed = $seed:expr $(,)?) => {
        $crate::__conformance! {
            @ $make $cases $name, $provider, $floor,
            $crate::Settings::default().with_seed($crate::Seed($seed)), []
        }
    };
    (
        $make:ident $cases:ident $name:ident, $provider:expr, floor = $floor:expr,
        except = [$($except:ident: $why:literal),* $(,)?] $(,)?
    ) => {
        $crate::__conformance! {
            @ $make $cases $name, $provider, $floor, $crate::Settings::default(), [$($except: $why),*]
        }
    };
    (
        @ $make:ident $cases:ident $name:ident, $provider:expr, $floor:expr, $settings:expr,
        [$($except:ident: $why:literal),*]
    ) => {
        #[cfg(test)]
        mod $name {
            #[allow(unused_imports)]
            use super::*;

            fn suite() -> &'static $crate::Suite {
                static SUITE: std::sync::OnceLock<$crate::Suite> = std::sync::OnceLock::new();
                SUITE.get_or_init(|| {
                    $crate::Suite::$make($provider)
                        .with_settings($settings)
                        $(.except(stringify!($except), $why))*
                })
            }

            $crate::$cases! { __tests }

            #[test]
            fn floor() {
                suite().assert_floor($floor);
            }
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __tests {
    ($($case:ident)*) => {
        $(#[test]
        fn $case() {
            suite().assert(stringify!($case));
        })*
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __names {
    ($($case:ident)*) => { &[$(stringify!($case)),*] };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __comm_cases {
    ($with:ident) => {
        $crate::$with! {
            rows_none_ep1 rows_none_ep2 rows_none_ep3 rows_none_ep8
            rows_block_ep1 rows_block_ep2 rows_block_ep3 rows_block_ep8
            rows_ptpc_ep1 rows_ptpc_ep2 rows_ptpc_ep3 rows_ptpc_ep8
            rows_tensor_ep1 rows_tensor_ep2 rows_tensor_ep3 rows_tensor_ep8
            rows_blockfnuz_ep1 rows_blockfnuz_ep2 rows_blockfnuz_ep3 rows_blockfnuz_ep8
            rows_ptpcfnuz_ep1 rows_ptpcfnuz_ep2 rows_ptpcfnuz_ep3 rows_ptpcfnuz_ep8
            rows_tensorfnuz_ep1 rows_tensorfnuz_ep2 rows_tensorfnuz_ep3 rows_tensorfnuz_ep8
            rows_static_ep1 rows_static_ep2 rows_static_ep3 rows_static_ep8
            deferred_block_ep1 deferred_block_ep2 deferred_block_ep3 deferred_block_ep8
            monolithic_none_ep1 monolithic_none_ep2 monolithic_none_ep3 monolithic_none_ep8
            monolithic_block_ep1 monolithic_block_ep2 monolithic_block_ep3 monolithic_block_ep8
            monolithic_static_ep2
            faultdispatch_none_ep1 faultdispatch_none_ep2 faultdispatch_block_ep8
            faultexperts_none_ep1 faultexperts_none_ep2 faultexperts_block_ep8
            faultdropped_none_ep1 faultdropped_none_ep2 faultdropped_block_ep8
            faulttwo_none_ep3 faulttwo_none_ep8
            foreignticket_none_ep1 foreignticket_none_ep2
            twohandles_none_ep1 twohandles_none_ep2 twohandles_none_ep8
            lostpeer_none_ep2 lostpeer_none_ep3
            bytes_none_ep1 bytes_block_ep2 bytes_tensor_ep8
            traffic_none_ep2 traffic_block_ep8
            layer_none_ep1 layer_none_ep2 layer_none_ep3 layer_none_ep8
            layer_block_ep1 layer_block_ep2 layer_block_ep3 layer_block_ep8
            layer_ptpc_ep1 layer_ptpc_ep2 layer_ptpc_ep3 layer_ptpc_ep8
            layer_tensor_ep1 layer_tensor_ep2 layer_tensor_ep3 layer_tensor_ep8
            layer_static_ep1 layer_static_ep2 layer_static_ep8
            rows_none_ep4n2 rows_none_ep6n3 rows_none_ep8n2 rows_none_ep8n4
            rows_block_ep4n2 rows_block_ep6n3 rows_block_ep8n2 rows_block_ep8n4
            rows_ptpc_ep4n2 rows_tensor_ep6n3 rows_static_ep8n4 deferred_block_ep8n4
            faultdispatch_none_ep4n2 faultdispatch_block_ep6n3 faultexperts_none_ep4n2 faultexperts_block_ep8n4
            faultdropped_none_ep4n2 faultdropped_none_ep6n3 faulttwo_none_ep8n2
            foreignticket_none_ep4n2 twohandles_none_ep4n2 twohandles_block_ep8n4
            lostpeer_none_ep4n2 lostpeer_none_ep6n3 bytes_none_ep4n2 bytes_block_ep6n3
            traffic_none_ep4n2 traffic_block_ep8n4
            layer_none_ep4n2 layer_none_ep6n3 layer_none_ep8n2 layer_none_ep8n4
            layer_block_ep4n2 layer_block_ep6n3 layer_block_ep8n2 layer_block_ep8n4
            layer_ptpc_ep4n2 layer_tensor_ep6n3 layer_static_ep8n2
            fp8back_none_ep1 fp8back_none_ep2 fp8back_block_ep3 fp8back_blockfnuz_ep8
            fp8back_none_ep4n2 fp8back_ptpc_ep6n3 fp8back_block_ep8n2 fp8back_ptpcfnuz_ep8n4
            layerfp8back_none_ep2 layerfp8back_block_ep8 layerfp8back_none_ep4n2 layerfp8back_block_ep8n4
            bytesfp8back_none_ep2 bytesfp8back_none_ep6n3
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __experts_cases {
    ($with:ident) => {
        $crate::$with! {
            oracle_none_ep1 oracle_none_ep2 oracle_none_ep3 oracle_none_ep8
            oracle_block_ep1 oracle_block_ep2 oracle_block_ep3 oracle_block_ep8
            oracle_ptpc_ep1 oracle_ptpc_ep2 oracle_ptpc_ep3 oracle_ptpc_ep8
            oracle_tensor_ep1 oracle_tensor_ep2 oracle_tensor_ep3 oracle_tensor_ep8
            oracle_blockfnuz_ep1 oracle_blockfnuz_ep2 oracle_blockfnuz_ep3 oracle_blockfnuz_ep8
            oracle_ptpcfnuz_ep1 oracle_ptpcfnuz_ep2 oracle_ptpcfnuz_ep3 oracle_ptpcfnuz_ep8
            oracle_tensorfnuz_ep1 oracle_tensorfnuz_ep2 oracle_tensorfnuz_ep3 oracle_tensorfnuz_ep8
            foreignids_none_ep3 foreignids_block_ep3 foreignids_ptpc_ep3 foreignids_tensor_ep3
            weightbytes_none_ep1 weightbytes_block_ep2 weightbytes_ptpc_ep1 weightbytes_tensor_ep2
            packing_none_ep2 packing_block_ep2 packing_ptpc_ep2 packing_tensor_ep2
            layer_none_ep1 layer_none_ep2 layer_none_ep3 layer_none_ep8
            layer_block_ep1 layer_block_ep2 layer_block_ep3 layer_block_ep8
            layer_ptpc_ep1 layer_ptpc_ep2 layer_ptpc_ep3 layer_ptpc_ep8
            layer_tensor_ep1 layer_tensor_ep2 layer_tensor_ep3 layer_tensor_ep8
            oracle_static_ep1 oracle_static_ep2 oracle_static_ep3 oracle_static_ep8
            oracle_mxfp4_ep1 oracle_mxfp4_ep2 oracle_mxfp4_ep3 oracle_mxfp4_ep8
            oracle_nvfp4_ep1 oracle_nvfp4_ep2 oracle_nvfp4_ep3 oracle_nvfp4_ep8
            gelu_none_ep2 gelu_block_ep2 gelutanh_none_ep2 gelutanh_ptpc_ep2
            swigluoai_none_ep2 swigluoai_block_ep2 clamped_none_ep2 clamped_tensor_ep2
            bias_none_ep1 bias_block_ep2 bias_ptpc_ep2 bias_tensor_ep2 bias_static_ep2 bias_mxfp4_ep2 bias_nvfp4_ep2
            padding_none_ep2 padding_block_ep2 padding_ptpc_ep2 padding_tensor_ep2 padding_static_ep2
            padding_mxfp4_ep2 padding_nvfp4_ep2 gptoss_none_ep3 gptoss_mxfp4_ep2
            stage1weight_none_ep2 stage1weight_block_ep2 stage1weight_ptpc_ep2 stage1weight_mxfp4_ep2
            weightbytes_static_ep1 weightbytes_mxfp4_ep2 weightbytes_nvfp4_ep1
            packing_static_ep2 packing_mxfp4_ep2 packing_nvfp4_ep2
            layer_static_ep1 layer_static_ep3 layer_static_ep8
            layer_mxfp4_ep1 layer_mxfp4_ep2 layer_mxfp4_ep8
            layer_nvfp4_ep1 layer_nvfp4_ep3 layer_nvfp4_ep8
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __monolithic_cases {
    ($with:ident) => {
        $crate::$with! {
            oracle_none_ep1 oracle_none_ep2 oracle_none_ep3 oracle_none_ep8
            oracle_block_ep1 oracle_block_ep2 oracle_block_ep3 oracle_block_ep8
            oracle_ptpc_ep1 oracle_ptpc_ep2 oracle_ptpc_ep3 oracle_ptpc_ep8
            oracle_tensor_ep1 oracle_tensor_ep2 oracle_tensor_ep3 oracle_tensor_ep8
            swigluoai_none_ep2 swigluoai_nvfp4_ep2 clamped_block_ep2 clamped_nvfp4_ep2 gptoss_mxfp4_ep2 gptoss_nvfp4_ep3
            bias_none_ep2 bias_block_ep2 bias_nvfp4_ep2 padding_none_ep2 padding_block_ep2 padding_static_ep2 padding_nvfp4_ep2
            weightbytes_none_ep1 weightbytes_block_ep2 weightbytes_ptpc_ep1 weightbytes_tensor_ep2
            packing_none_ep2 packing_block_ep2 packing_ptpc_ep2 packing_tensor_ep2
            layer_none_ep1 layer_none_ep2 layer_none_ep3 layer_none_ep8
            layer_block_ep1 layer_block_ep2 layer_block_ep3 layer_block_ep8
            layer_ptpc_ep1 layer_ptpc_ep2 layer_ptpc_ep3 layer_ptpc_ep8
            layer_tensor_ep1 layer_tensor_ep2 layer_tensor_ep3 layer_tensor_ep8
            oracle_static_ep1 oracle_static_ep2 oracle_static_ep3 oracle_static_ep8
            oracle_mxfp4_ep1 oracle_mxfp4_ep2
            oracle_nvfp4_ep1 oracle_nvfp4_ep2 oracle_nvfp4_ep3 oracle_nvfp4_ep8
            weightbytes_static_ep1 weightbytes_mxfp4_ep2 weightbytes_nvfp4_ep1
            packing_static_ep2 packing_mxfp4_ep2 packing_nvfp4_ep2
            layer_static_ep1 layer_static_ep3 layer_static_ep8
            layer_mxfp4_ep2
            layer_nvfp4_ep1 layer_nvfp4_ep3 layer_nvfp4_ep8
        }
    };
}
