import ApertusKit
import ApertusMLX
import Foundation

#if canImport(Darwin)
    import Darwin
#endif

/// What `bench --json` prints; the keys are those of `apertus-mlx bench --json`, as far as there is
/// something to say.
struct BenchReport {
    let name: String
    let workload: BenchCommand.Workload
    /// Of each task the seconds of each round.
    let taken: [[Double]]
    let apertus: Apertus
    let checkpoint: Checkpoint
    let started: Date
    /// Seconds that loading took.
    let loaded: Double

    var values: Report {
        .object([
            ("date", .text(started.ISO8601Format())), ("machine", machine),
            // Python moves memory to find out.
            ("bandwidth_bytes_per_s", .object([("published", .null), ("measured", .null)])),
            ("model", model),
            (
                "workload",
                .object([
                    ("prompt_tokens", .integers(workload.promptTokens)),
                    ("depths", .integers(workload.depths)),
                    ("new_tokens", .integer(workload.newTokens)),
                    ("rounds", .integer(workload.rounds)), ("seed", .integer(workload.seed)),
                ])
            ),
            ("sides", .list([side])), ("ratios", .list([])), ("notes", .list([])),
        ])
    }

    private var machine: Report {
        let system = ProcessInfo.processInfo
        return .object([
            (
                "identity",
                .object([
                    ("chip", Self.chip.map { .text($0) } ?? .null),
                    ("system", .text(system.operatingSystemVersionString)),
                ])
            ),
            ("architecture", .text(Self.architecture)), ("gpu", .flag(computesOnGPU)),
            ("memory_bytes", .integer(Int(system.physicalMemory))),
            ("available_bytes", .integer(apertus.plan.limitBytes)),
        ])
    }

    private var model: Report {
        let parameters = Layout.parameterCount(checkpoint.config)
        let bits = 8 * Double(checkpoint.storedBytes) / Double(parameters)
        return .object([
            ("name", .text(name)), ("parameters", .integer(parameters)),
            ("bits_per_weight", .number(bits)),
            ("weights_read_bytes", .integer(checkpoint.readBytes)),
            ("context_tokens", .integer(checkpoint.config.maxPositions)),
        ])
    }

    private var side: Report {
        let plan = apertus.plan
        let type = apertus.computeType
        return .object([
            ("name", .text("apertus")),
            (
                "ready",
                .object([
                    ("backend", .text(computesOnGPU ? "MLX on the GPU" : "MLX on the CPU")),
                    ("on_gpu", .flag(computesOnGPU)), ("dtype", .text(type.rawValue)),
                    ("cache", .text("\(plan.form)")), ("number_bytes", .integer(type.byteCount)),
                    ("prefill_step", .integer(plan.prefillStep)), ("load_s", .number(loaded)),
                ])
            ),
            ("peak_memory_bytes", .integer(apertus.memory.peak)), ("speculation", .null),
            ("measurements", .list(zip(workload.tasks, taken).map(measurement))),
        ])
    }

    private var planner: MemoryPlanner {
        var terms = MemoryTerms(checkpoint)
        terms.computeBytes = apertus.computeType.byteCount
        return MemoryPlanner(checkpoint.config, terms)
    }

    private func measurement(_ task: BenchCommand.Task, _ seconds: [Double]) -> Report {
        let found = Self.rates(task, workload, seconds)
        let rate = Report.object([
            ("median", .number(Self.median(found))),
            ("spread", .number((found.last! - found[0]) / 2)),
            ("samples", .list(found.map { .number($0) })),
        ])
        let bytes: Report =
            task.kind == "prefill"
            ? .null
            : .integer(
                planner.kvReadBytes(
                    apertus.plan.form, depth: task.positions, steps: workload.newTokens))
        return .object([
            ("task", .object([("kind", .text(task.kind)), ("tokens", .integer(task.tokens))])),
            ("tokens_per_s", rate), ("seconds", .list(seconds.map { .list([.number($0)]) })),
            ("kv_read_bytes", bytes), ("roofline_tokens_per_s", .null), ("roofline_share", .null),
        ])
    }

    /// Tokens per second of each round, ascending.
    static func rates(
        _ task: BenchCommand.Task, _ workload: BenchCommand.Workload, _ seconds: [Double]
    ) -> [Double] {
        let count = task.kind == "prefill" ? task.tokens : workload.newTokens
        return seconds.map { Double(count) / $0 }.sorted()
    }

    static func median(_ sorted: [Double]) -> Double {
        let middle = sorted.count / 2
        return sorted.count % 2 == 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
    }

    /// What macOS calls the chip.
    private static var chip: String? {
        #if canImport(Darwin)
            var size = 256
            var text = [CChar](repeating: 0, count: size)
            guard sysctlbyname("machdep.cpu.brand_string", &text, &size, nil, 0) == 0 else {
                return nil
            }
            return String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
        #else
            nil
        #endif
    }

    private static var architecture: String {
        #if arch(arm64)
            "arm64"
        #else
            "x86_64"
        #endif
    }
}
