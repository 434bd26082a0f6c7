import ApertusKit
import Foundation

/// `apertus bench`: speed and memory of a model on this machine.
enum BenchCommand {
    private static let most = 1 << 20

    static let grammar = Grammar(
        command: "bench",
        words: "Measure how fast MODEL reads and writes here, and what it takes in memory. "
            + "Tokens are random; a first go does not count.",
        operands: ["MODEL"],
        options: [
            Option(
                "--prompt-tokens", kind: .text,
                "Lengths of prompts to read; default: 128,512,2048; '' for none."),
            Option(
                "--depths", kind: .text,
                "Tokens that stand before; default: 0,1024,4096; '' for none."),
            Option("--new-tokens", kind: .integer(1 ... most), "Tokens decoded at a depth."),
            Option("--rounds", kind: .integer(1 ... most), "How often all is measured."),
            Option("--seed", kind: .integer(0 ... 1 << 32), "Same seed, same random prompts."),
        ] + ModelOptions.running + [ModelOptions.json])

    /// One thing to time: reading a prompt of `tokens`, or decoding behind so many.
    struct Task {
        let kind: String
        let tokens: Int
        var positions: Int { max(tokens, 1) }
        var words: String { kind == "prefill" ? "prefill \(tokens)" : "decode at \(tokens)" }
    }

    struct Workload {
        let promptTokens, depths: [Int]
        let newTokens, rounds, seed: Int

        init(_ arguments: Arguments, contextLength: Int) throws {
            newTokens = arguments.integer("--new-tokens") ?? 64
            rounds = arguments.integer("--rounds") ?? 5
            seed = arguments.integer("--seed") ?? 0
            let room = contextLength - newTokens - 1
            guard room >= 1 else {
                throw ApertusError(
                    .usage,
                    "--new-tokens \(newTokens): the model's context is \(contextLength); give fewer"
                )
            }
            promptTokens = try Self.counts(
                "--prompt-tokens", arguments, 1, [128, 512, 2048], contextLength - 1)
            depths = try Self.counts("--depths", arguments, 0, [0, 1024, 4096], room)
            guard !promptTokens.isEmpty || !depths.isEmpty else {
                throw ApertusError(
                    .usage, "--prompt-tokens and --depths are both empty: nothing to measure")
            }
        }

        var tasks: [Task] {
            promptTokens.map { Task(kind: "prefill", tokens: $0) }
                + depths.map { Task(kind: "decode", tokens: $0) }
        }
        var context: Int { tasks.map { $0.positions + 1 + newTokens }.max() ?? 1 }

        /// Counts as `128,512`, ascending, each once; an empty text is none at all.
        private static func counts(
            _ option: String, _ arguments: Arguments, _ least: Int, _ usual: [Int], _ most: Int
        ) throws -> [Int] {
            guard let text = arguments.text(option) else {
                return Set(usual.map { min($0, most) }).sorted()
            }
            let words = text.split(separator: ",").map { $0.trimmingCharacters(in: .whitespaces) }
            return try Set(
                words.filter { !$0.isEmpty }.map { word in
                    guard let count = Int(word), count >= least else {
                        throw ApertusError(
                            .usage,
                            "\(option) \(text.prefix(40).debugDescription): expected numbers from "
                                + "\(least), as 128,512")
                    }
                    guard count <= most else {
                        throw ApertusError(
                            .usage,
                            "\(option) \(word): at most \(most) fit the model's context beside the "
                                + "new tokens")
                    }
                    return count
                }
            ).sorted()
        }
    }

    static func run(_ arguments: Arguments, _ interrupts: Interrupts) async throws {
        let started = Date()
        let clock = ContinuousClock()
        let begun = clock.now
        guard let path = arguments.operands.first else {
            throw ApertusError(.usage, "MODEL is missing; see `apertus bench --help`")
        }
        let folder = try ModelFolder(URL(fileURLWithPath: path, isDirectory: true))
        let workload = try Workload(arguments, contextLength: folder.config.maxPositions)
        var load = try ModelOptions.load(arguments)
        load.context = min(workload.context, folder.config.maxPositions)
        load.cacheForm = load.cacheForm ?? .full  // the planner must not change what is compared
        let plan = try folder.plan(load)
        let apertus = try await Apertus(folder, plan: plan, load)
        let loaded = seconds(clock.now - begun)
        var taken: [[Double]] = []
        for task in workload.tasks {
            Sink.note("\(task.words): \(counted(workload.rounds, "round"))")
            taken.append(try await measure(task, workload, apertus))
        }
        if arguments.has("--json") {
            let report = BenchReport(
                name: path, workload: workload, taken: taken, apertus: apertus,
                checkpoint: try Checkpoint(folder: folder.url), started: started, loaded: loaded)
            Sink.putLine(report.values.written())
            return
        }
        Sink.put(
            "loads in \(rounded(loaded, 2)) s, peak memory "
                + "\(formatBytes(apertus.memory.peak)), cache in \(plan.form)\n\n")
        let rates = zip(workload.tasks, taken).map { BenchReport.rates($0, workload, $1) }
        let names = workload.tasks.map(\.words)
        let width = (["tokens/s"] + names).map(\.count).max() ?? 0
        Sink.put("tokens/s".padding(toLength: width, withPad: " ", startingAt: 0) + "  apertus\n")
        for (name, found) in zip(names, rates) {
            let spread = (found.last! - found[0]) / 2
            Sink.put(
                name.padding(toLength: width, withPad: " ", startingAt: 0)
                    + "  \(rounded(BenchReport.median(found), 1)) ± \(rounded(spread, 1))\n")
        }
    }

    /// Seconds of each round.
    private static func measure(
        _ task: Task, _ workload: Workload, _ apertus: Apertus
    ) async throws -> [Double] {
        var generator = SplitMix(state: UInt64(workload.seed))
        let size = apertus.engine.folder.config.vocabSize
        let prompt = (0 ..< task.positions).map { _ in Int.random(in: 0 ..< size, using: &generator)
        }
        let new = task.kind == "prefill" ? 0 : workload.newTokens
        var found: [Double] = []
        for _ in 0 ... workload.rounds {
            let (reading, drawing) = try await apertus.engine.measure(prompt, newTokens: new)
            found.append(new == 0 ? reading : drawing)
        }
        return Array(found.dropFirst())
    }
}

/// A generator of random numbers with a seed (Steele and others, 2014).
private struct SplitMix: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var mixed = state
        mixed = (mixed ^ mixed >> 30) &* 0xBF58_476D_1CE4_E5B9
        mixed = (mixed ^ mixed >> 27) &* 0x94D0_49BB_1331_11EB
        return mixed ^ mixed >> 31
    }
}
