//! Plans: faults in TOML.

use std::collections::BTreeSet;
use std::time::Duration;

use nvme_soft::fault::{
    Behaviour, Change, CompletionField, EnableRefusal, Fault, FaultKind, FaultQueue, FaultStatus,
    Loss, Opcode, Plan, PlanError, TornBlocks, TornEnd,
};
use nvme_soft::{Config, NamespaceChange, SoftController, StartError};
use nvme_spec::Status;
use nvme_spec::opcode::{AdminOpcode, NvmOpcode};

use crate::host::Host;

/// One fault of each kind and with each parameter.
fn everything() -> Plan {
    let random = Loss::Random(7);
    let status = FaultStatus::after_execution(
        Status::UNRECOVERED_READ_ERROR
            .with_dnr(true)
            .with_crd(3)
            .with_more(true),
    );
    let tear = |blocks, then| Behaviour::Tear { blocks, then };
    let corrupt = |field, change| Behaviour::CorruptCompletion { field, change };
    let commands = [
        Behaviour::Delay(Duration::from_micros(80)),
        Behaviour::Swallow { execute: true },
        Behaviour::Hold,
        Behaviour::CompleteTwice(Duration::from_nanos(1_500_000_001)),
        Behaviour::OutOfOrder(3),
        Behaviour::CompleteEarly(Duration::from_secs(2)),
        Behaviour::Status(status),
        corrupt(CompletionField::Cid, Change::Xor(0x4000)),
        corrupt(CompletionField::SqId, Change::Set(9)),
        corrupt(CompletionField::SqHead, Change::Set(9)),
        corrupt(CompletionField::Phase, Change::Xor(1)),
        corrupt(CompletionField::Result, Change::Set(u32::MAX)),
        Behaviour::FlipPhase,
        Behaviour::CorruptData {
            offset: 516,
            bytes: vec![0xff, 0],
        },
        Behaviour::TruncateData(0),
        Behaviour::LoseInterrupt,
        Behaviour::SpuriousInterrupt,
        tear(TornBlocks::First(1), TornEnd::Swallow),
        tear(TornBlocks::Random(1), TornEnd::PowerLoss(random)),
        tear(TornBlocks::Random(1), TornEnd::Status(status)),
        Behaviour::PowerLoss(Loss::All),
        Behaviour::Fail { serve: true },
        Behaviour::Vanish(Loss::Nothing),
        Behaviour::ChangeNamespace(NamespaceChange::Resize {
            nsid: 1,
            bytes: 1 << 20,
        }),
        Behaviour::ChangeNamespace(NamespaceChange::Format {
            nsid: 1,
            lba_size: 4096,
        }),
        Behaviour::ChangeNamespace(NamespaceChange::Detach { nsid: 2 }),
        Behaviour::ChangeNamespace(NamespaceChange::Attach { nsid: 2 }),
        Behaviour::AddNamespace {
            bytes: 1 << 20,
            lba_size: 4096,
        },
    ];
    let events = [
        Behaviour::RefuseEnable(EnableRefusal::NeverReady),
        Behaviour::RefuseEnable(EnableRefusal::Fail),
        Behaviour::SlowReady(Duration::from_millis(700)),
        Behaviour::HangDisable,
        Behaviour::FailReset,
        Behaviour::HangShutdown,
    ];
    let opcodes: [Opcode; 4] = [
        NvmOpcode::WRITE_ZEROES.into(),
        AdminOpcode::CREATE_IO_SUBMISSION_QUEUE.into(),
        NvmOpcode::FLUSH.into(),
        Opcode::Any(0xc0),
    ];
    let queues = [FaultQueue::Admin, FaultQueue::Io, FaultQueue::Id(3)];
    let commands = commands.into_iter().enumerate().map(|(index, then)| {
        Fault::new(then)
            .queue(queues[index % queues.len()])
            .opcode(opcodes[index % opcodes.len()])
            .namespace(index as u32)
            .blocks(8..16)
            .nth(2)
            .times(index as u64)
    });
    let events = events
        .into_iter()
        .map(|then| Fault::new(then).probability(0.25, 11));
    Plan {
        faults: commands.chain(events).collect(),
    }
}

#[test]
fn a_plan_survives_being_written_and_parsed() {
    let plan = everything();
    let kinds: BTreeSet<_> = plan.faults.iter().map(|fault| fault.then.kind()).collect();
    assert_eq!(kinds, FaultKind::ALL.into_iter().collect());
    let text = plan.to_string();
    assert_eq!(text.parse::<Plan>().expect(&text), plan);
    for kind in FaultKind::ALL {
        assert!(text.contains(kind.name()), "{kind}");
    }
}

#[test]
fn the_example_is_a_plan() {
    let text = include_str!("../../examples/faults.toml");
    let plan: Plan = text.parse().unwrap();
    let kinds: Vec<_> = plan.faults.iter().map(|fault| fault.then.kind()).collect();
    assert_eq!(
        kinds,
        [
            FaultKind::Delay,
            FaultKind::Hold,
            FaultKind::Status,
            FaultKind::CorruptCompletion,
            FaultKind::Tear,
            FaultKind::RefuseEnable
        ]
    );
    let delay = Fault::new(Behaviour::Delay(Duration::from_millis(5)))
        .opcode(NvmOpcode::READ)
        .nth(3);
    assert_eq!(plan.faults[0], delay);
    let media = Fault::new(Behaviour::Status(FaultStatus::new(
        Status::UNRECOVERED_READ_ERROR,
    )))
    .opcode(NvmOpcode::READ)
    .probability(0.001, 7)
    .times(0);
    assert_eq!(plan.faults[2], media);
}

#[test]
fn what_is_left_out_is_as_documented() {
    let text = "[[fault]]\nthen = { add-namespace = { bytes = 4096 } }";
    let then = Behaviour::AddNamespace {
        bytes: 4096,
        lba_size: 512,
    };
    assert_eq!(text.parse::<Plan>().unwrap().faults, [Fault::new(then)]);
    let text = "[[fault]]\nthen = { swallow = {} }\n[[fault]]\nthen = { fail = {} }";
    let [swallow, fail] = [
        Behaviour::Swallow { execute: false },
        Behaviour::Fail { serve: false },
    ]
    .map(Fault::new);
    assert_eq!(text.parse::<Plan>().unwrap().faults, [swallow, fail]);
}

#[test]
fn numbers_beyond_what_toml_has_are_no_panic() {
    let fault = Fault::new(Behaviour::PowerLoss(Loss::Random(u64::MAX))).probability(0.5, u64::MAX);
    let plan = Plan {
        faults: vec![fault],
    };
    let text = plan.to_string();
    assert_eq!(text.parse::<Plan>().expect(&text), plan);
}

#[test]
fn an_empty_plan_has_no_faults() {
    assert_eq!("".parse::<Plan>().unwrap(), Plan::default());
}

#[test]
fn what_is_wrong_is_said_with_line_and_key() {
    let head = "# a plan\n[[fault]]\n";
    for (text, line, key) in [
        ("then = \"explode\"", "line 3", "explode"),
        ("then = { delay = 5 }", "line 3", "delay"),
        ("then = { delay = \"5\" }", "line 3", "is not a time"),
        (
            "when = { opcode = \"raed\" }\nthen = \"hold\"",
            "line 3",
            "raed",
        ),
        ("when = { opcode = 256 }\nthen = \"hold\"", "line 3", "256"),
        (
            "when = { queue = \"both\" }\nthen = \"hold\"",
            "line 3",
            "both",
        ),
        ("when = { queue = -1 }\nthen = \"hold\"", "line 3", "-1"),
        (
            "when = { times = \"often\" }\nthen = \"hold\"",
            "line 3",
            "always",
        ),
        ("when = { color = 1 }\nthen = \"hold\"", "line 3", "color"),
        ("then = { status = { sct = 1 } }", "line 3", "sc"),
        ("then = \"hold\"\nwhat = 1", "line 4", "what"),
        (
            "then = { swallow = { executes = true } }",
            "line 3",
            "executes",
        ),
        (
            "then = { tear = { blocks = { last = 1 }, then = \"swallow\" } }",
            "line 3",
            "last",
        ),
        ("when = {}", "line 2", "then"),
        ("then = ", "line 3", "then ="),
        ("then = \"hold\"\n[faults]", "line 4", "faults"),
    ] {
        let error = format!("{head}{text}").parse::<Plan>().expect_err(text);
        assert!(matches!(error, PlanError::Parse(_)));
        let message = error.to_string();
        assert!(message.contains(line) && message.contains(key), "{message}");
    }
}

#[test]
fn faults_that_make_no_sense_are_counted_out() {
    for (text, expected) in [
        (
            "then = { status = { sct = 8, sc = 0 } }",
            "fault 2 of the plan: sct: not within 0..=7",
        ),
        (
            "then = { status = { sc = 0, crd = 4 } }",
            "fault 2 of the plan: crd: not within 0..=3",
        ),
        (
            "then = { corrupt-data = { offset = 0, bytes = [] } }",
            "fault 2 of the plan: bytes: not within one byte and more",
        ),
        (
            "then = { out-of-order = 0 }",
            "fault 2 of the plan: out-of-order: not within 1 and above",
        ),
        (
            "then = \"fail-reset\"\nwhen = { lba = { start = 0, end = 1 } }",
            "fault 2 of the plan: fail-reset strikes no command, so lba matches nothing",
        ),
        (
            "then = \"hold\"\nwhen = { probability = 1.5 }",
            "fault 2 of the plan: probability: not within 0.0..=1.0",
        ),
    ] {
        let error = format!("[[fault]]\nthen = \"hold\"\n[[fault]]\n{text}")
            .parse::<Plan>()
            .unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn files_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("plan.toml");
    let missing = Plan::read(&path).unwrap_err();
    assert!(matches!(missing, PlanError::Read { .. }));
    assert!(missing.to_string().contains("plan.toml"), "{missing}");
    std::fs::write(&path, "[[fault]]\nthen = 1\n").unwrap();
    let wrong = Plan::read(&path).unwrap_err().to_string();
    assert!(
        wrong.contains("plan.toml") && wrong.contains("line 2"),
        "{wrong}"
    );
    std::fs::write(&path, everything().to_string()).unwrap();
    assert_eq!(Plan::read(&path).unwrap(), everything());
}

#[test]
fn a_configuration_with_a_wrong_fault_is_refused() {
    let host = Host::new(Config::default());
    let config = Config {
        faults: vec![
            Fault::new(Behaviour::Hold),
            Fault::new(Behaviour::Hold).nth(0),
        ],
        ..Config::default()
    };
    let refused = SoftController::start(config, host.memory.clone(), host.vectors.clone());
    let Err(StartError::Fault { number: 2, .. }) = refused else {
        panic!("{refused:?}");
    };
}
