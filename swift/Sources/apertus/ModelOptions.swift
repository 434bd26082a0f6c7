import ApertusKit
import Foundation

/// The options that commands share, by the names that `apertus-mlx` has for them.
enum ModelOptions {
    static let model = Option("--model", "-m", kind: .text, "Model folder.")
    static let json = Option("--json", kind: .flag, "Print one JSON object.")
    static let system = Option("--system", "-s", kind: .text, "System message.")
    static let messages = Option(
        "--messages", kind: .text,
        "Answer a conversation instead: JSON as OpenAI's API takes it; - for standard input.")
    static let tools = Option(
        "--tools", kind: .text,
        "Tools that the model may call: JSON as OpenAI's API takes it.")
    static let promptCache = Option(
        "--prompt-cache", kind: .text,
        "Keep what a prompt computes in this file, and go on from it.")
    static let think = Option(
        "--think", kind: .flag, "Let the model deliberate first (shown on stderr).")

    static let sampling = [
        Option(
            "--max-tokens", "-n", kind: .integer(1 ... Int(Int32.max)), "Most tokens to generate."),
        Option(
            "--temperature", "--temp", "-t", kind: .number(0 ... 100),
            "0 takes the likeliest token; default: the model's."),
        Option(
            "--top-p", kind: .number(1.2e-38 ... 1),
            "Draw from the likeliest with this share in all."),
        Option("--top-k", kind: .integer(0 ... .max), "Draw from so many likeliest; 0 from all."),
        Option("--min-p", kind: .number(0 ... 1), "Drop tokens below this share of the likeliest."),
        Option(
            "--repetition-penalty", kind: .number(1e-20 ... 100),
            "Above 1 discourages repetition."),
        Option(
            "--presence-penalty", kind: .number(-2 ... 2),
            "Above 0 discourages words the answer has; -2 to 2."),
        Option(
            "--frequency-penalty", kind: .number(-2 ... 2),
            "As presence, for each time they came; -2 to 2."),
        Option("--seed", kind: .integer(0 ... .max), "Same seed, same text."),
        Option(
            "--stop", kind: .text, "End the answer before this text; repeatable.",
            isRepeatable: true),
    ]

    static let running = [
        Option(
            "--kv-bits", kind: .integer(2 ... 16),
            "Bits of cached keys and values: 2, 3, 4, 6, 8 or 16 (full)."),
        Option(
            "--kv-bits-v", kind: .integer(2 ... 16),
            "Bits of cached values; default: those of keys."),
        Option(
            "--max-kv", kind: .integer(1 ... 1 << 30),
            "Keep at most this many positions: the first few, the latest."),
        Option(
            "--kv-sink", kind: .integer(0 ... 1 << 24),
            "First positions that stay under --max-kv or --kv-bits; default: 4."),
        Option(
            "--kv-rotate", kind: .flagOrNot,
            "Rotate keys before they are quantized; default: where heads allow it."),
        Option(
            "--prefill-step", kind: .integer(1 ... 1 << 20),
            "Prompt tokens per step; default: 512, or less."),
        Option("--dtype", kind: .text, "bfloat16, float16 or float32; default: what suits."),
        Option(
            "--memory-limit", kind: .text,
            "Most memory, as 1.2GB or in bytes; default: what the machine can give."),
        Option("--force", kind: .flag, "Try even where the memory will not suffice."),
        Option("--compute", kind: .text, "auto or mlx: there is nothing else here."),
        Option("--precision", kind: .text, "auto or float32: MLX rounds no activations."),
        Option("--offline", kind: .flag, "Nothing else is done here."),
    ]

    /// Options of `apertus-mlx` that are not there, since what they ask for is not.
    static let missing: Set = [
        "--tool-choice", "--logit-bias", "--max-thought-tokens", "--schema", "--output-filter",
        "--draft", "--draft-vocab", "--embedding", "--pipeline",
        "--revision", "--against", "--plot", "--golden",
    ]

    /// The folder that `--model` names; there is no embedded model here.
    static func folder(_ arguments: Arguments) throws -> URL {
        guard let path = arguments.text("--model"), !path.isEmpty else {
            throw ApertusError(
                .usage, "--model is missing: the folder that apertus-mlx convert wrote")
        }
        return URL(fileURLWithPath: path, isDirectory: true)
    }

    static func answer(_ arguments: Arguments) -> AnswerOptions {
        var options = AnswerOptions()
        options.maxTokens = arguments.integer("--max-tokens") ?? options.maxTokens
        options.temperature = arguments.number("--temperature")
        options.topP = arguments.number("--top-p")
        options.topK = arguments.integer("--top-k")
        options.minP = arguments.number("--min-p")
        options.repetitionPenalty = arguments.number("--repetition-penalty")
        options.presencePenalty = arguments.number("--presence-penalty")
        options.frequencyPenalty = arguments.number("--frequency-penalty")
        options.seed = arguments.integer("--seed").map { UInt64($0) }
        options.stops = arguments.texts("--stop")
        return options
    }

    static func load(_ arguments: Arguments) throws -> LoadOptions {
        var options = LoadOptions()
        let names = ["--kv-bits", "--kv-bits-v", "--max-kv", "--kv-sink", "--kv-rotate"]
        if names.contains(where: { arguments.text($0) != nil }) {
            let form = try CacheForm(
                keyBits: arguments.integer("--kv-bits") ?? CacheForm.fullBits,
                valueBits: arguments.integer("--kv-bits-v"), bound: arguments.integer("--max-kv"),
                sinks: arguments.integer("--kv-sink") ?? 4, rotates: arguments.flag("--kv-rotate"))
            try requireEffect(form, arguments)
            options.cacheForm = form
        }
        try require(arguments, "--compute", ["auto", "mlx"])
        try require(arguments, "--precision", ["auto", "float32"])
        options.prefillStep = arguments.integer("--prefill-step")
        if let name = arguments.text("--dtype") {
            guard let type = LoadOptions.ComputeType(rawValue: name) else {
                throw ApertusError(
                    .usage,
                    "--dtype \(name.prefix(40).debugDescription): expected bfloat16, float16 "
                        + "or float32")
            }
            options.computeType = type
        }
        options.memoryLimit = try arguments.text("--memory-limit").map(bytes)
        options.ignoresMemoryLimit = arguments.has("--force")
        return options
    }

    /// Refuse what would do nothing.
    private static func requireEffect(_ form: CacheForm, _ arguments: Arguments) throws {
        if form.rotates == true, form.keyBits == CacheForm.fullBits {
            throw ApertusError(
                .usage, "--kv-rotate: keys are rotated to be quantized; give --kv-bits, too")
        }
        if arguments.text("--kv-sink") != nil, form.bound == nil, !form.isQuantized {
            throw ApertusError(
                .usage,
                "--kv-sink: without a bound or bits all positions stay as they are; give --max-kv or "
                    + "--kv-bits, too")
        }
    }

    private static func require(
        _ arguments: Arguments, _ name: String, _ known: [String]
    ) throws {
        guard let value = arguments.text(name), !known.contains(value) else { return }
        throw ApertusError(
            .usage,
            "\(name) \(value.prefix(40).debugDescription): expected \(known.joined(separator: " or ")); "
                + "for others use apertus-mlx")
    }

    /// A size as 1.2GB, 800 MiB or in bytes.
    private static func bytes(_ text: String) throws -> Int {
        let units: [String: Double] = [
            "": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 1024,
            "mib": 1_048_576, "gib": 1_073_741_824, "tib": 1_099_511_627_776,
        ]
        let digits = text.prefix { $0.isNumber || $0 == "." }
        let unit = text.dropFirst(digits.count).filter { $0 != " " }.lowercased()
        guard let number = Double(digits), let scale = units[unit], number * scale >= 1,
            number * scale < 1e18
        else {
            throw ApertusError(
                .usage,
                "--memory-limit \(text.prefix(40).debugDescription): expected a size such as 1.2GB")
        }
        return Int(number * scale)
    }
}
