import Foundation

/// Bytes of each part of a run, at the point where it is largest.
public struct Footprint: Sendable, Equatable {
    public let weightsBytes, kvBytes, prefillBytes, logitsBytes: Int

    /// The peak: the last chunk of a prompt and the first logits do not coincide.
    public var totalBytes: Int { weightsBytes + kvBytes + max(prefillBytes, logitsBytes) }
}

/// Settings that keep a run under a limit, and what it will take.
public struct MemoryPlan: Sendable, Equatable {
    public let form: CacheForm
    /// Tokens of a prompt that are computed at a time.
    public let prefillStep: Int
    /// Tokens of prompt and answer.
    public let context: Int
    public let footprint: Footprint
    public let limitBytes: Int

    /// How many freed bytes MLX may keep for its next operations: what the limit leaves, within
    /// reason.
    public var bufferCacheBytes: Int {
        max(8_000_000, min(limitBytes - footprint.totalBytes, 512_000_000))
    }
}

/// Says what a model takes with each form of cache, and chooses what fits a limit; the numbers are
/// those of `apertus-mlx plan`.
public struct MemoryPlanner: Sendable {
    /// Tokens of a prompt at a time, from the fastest to the leanest.
    public static let prefillSteps = [512, 256, 128, 64, 32]
    /// Steps down to this cost little speed; smaller ones are tried after the caches' precision.
    static let comfortableStep = 128
    static let leastContext = 512
    // What attention over a quantized cache computes at a time.
    static let mostScoresBytes = 8_388_608.0

    let config: ModelConfig
    let terms: MemoryTerms

    /// - Parameter terms: of the manifest, or of the checked folder where it has none.
    public init(_ config: ModelConfig, _ terms: MemoryTerms) {
        (self.config, self.terms) = (config, terms)
    }

    /// The forms that this model's heads allow, best first; 2 bits only on request.
    public var possibleForms: [CacheForm] {
        [16, 8, 6, 4, 3].compactMap { bits in
            guard let form = try? CacheForm(keyBits: bits),
                (try? form.requireFit(headDim: config.headDim)) != nil
            else { return nil }
            return form
        }
    }

    /// The best settings with which `context` positions stay under `limitBytes`.
    ///
    /// What is given is kept, the rest chosen: full precision and long steps first.
    ///
    /// - Parameter bounds: whether a bounded cache, which forgets, may be chosen when nothing else
    ///   fits.
    /// - Throws: `ApertusError` that says how much is missing and what would fit.
    public func plan(
        limitBytes: Int, context: Int, form: CacheForm? = nil, prefillStep: Int? = nil,
        bounds: Bool = false
    ) throws -> MemoryPlan {
        guard (1 ... config.maxPositions).contains(context) else {
            throw ApertusError(
                .usage, "context of \(context) tokens: the model's is \(config.maxPositions)")
        }
        guard (prefillStep ?? 1) > 0 else {
            throw ApertusError(.usage, "prefill step of \(prefillStep ?? 0) tokens: expected 1 or more")
        }
        try form?.requireFit(headDim: config.headDim)
        for (form, step) in settings(context, form, prefillStep, bounds) {
            let needed = footprint(form, context: context, prefillStep: step)
            if needed.totalBytes <= limitBytes {
                return MemoryPlan(
                    form: form, prefillStep: step, context: context, footprint: needed,
                    limitBytes: limitBytes)
            }
        }
        throw refusal(limitBytes, context, form, prefillStep)
    }

    /// The peak of a run that ends with `context` positions, nearly all of them prompt.
    public func footprint(_ form: CacheForm, context: Int, prefillStep: Int) -> Footprint {
        Footprint(
            weightsBytes: terms.weightsBytes,
            kvBytes: bytes(Double(config.layers) * layerBytes(form, context)),
            prefillBytes: prefillBytes(form, context, prefillStep),
            logitsBytes: bytes(
                Double(24 * config.outputVocabSize) + layerBytes(form, context)
                    + Double(terms.fixedBytes)))
    }

    /// Bytes that one more position takes.
    public func kvBytesPerPosition(_ form: CacheForm) -> Double {
        Double(config.layers) * row * pairBits(form) / 8
    }

    /// Bytes of keys and values that a token reads, on average over `steps` behind `depth`.
    package func kvReadBytes(_ form: CacheForm, depth: Int, steps: Int) -> Int {
        let (full, coded) = (kvBytesPerPosition(.full), kvBytesPerPosition(form))
        let read = (depth + 1 ... depth + steps).reduce(0.0) { sum, positions in
            let seen = min(positions, form.bound ?? positions)
            let codes = min(form.flushed(positions), seen)
            return sum + Double(codes) * coded + Double(seen - codes) * full
        }
        return Int((read / Double(steps)).rounded(.toNearestOrEven))
    }

    /// The longest context, up to the model's, that stays under `limitBytes`; 0 if none does.
    public func largestContext(limitBytes: Int, _ form: CacheForm, prefillStep: Int) -> Int {
        largest(upTo: config.maxPositions) {
            footprint(form, context: $0, prefillStep: prefillStep).totalBytes <= limitBytes
        }
    }

    /// Numbers of a key, of all heads.
    private var row: Double { Double(config.kvHeads) * Double(config.headDim) }
    private var numberBytes: Double { Double(terms.computeBytes) }

    private func prefillBytes(_ form: CacheForm, _ context: Int, _ step: Int) -> Int {
        let length = min(step, context)
        let numbers = numberBytes * Double(length)
        let mlp = numbers * Double(config.intermediateSize)
        let scores =
            numbers * Double(config.heads) * Double(positionsSeen(form, context, length))
        var attention = terms.scores * scores
        if form.isQuantized {
            let one = (scores / Double(length)).rounded(.down)
            attention = terms.scoresInBlocks * min(scores, max(Self.mostScoresBytes, one))
            attention += terms.quantization * numbers * (2 * row)
        }
        var working = terms.mlp * mlp + max(1.1 * mlp, attention)
        working += terms.residual * numbers * Double(config.hiddenSize)
        let copied = 2 * row * numberBytes
        working += Double(config.layers) * copied * Double(rowsCopied(form, context, length))
        return bytes(working) + terms.fixedBytes
    }

    /// Bytes that the cache of one layer has allocated after `positions`.
    private func layerBytes(_ form: CacheForm, _ positions: Int) -> Double {
        guard form.isQuantized else {
            let rows = min(Self.capacity(positions), form.bound ?? .max)
            return 2 * row * Double(rows) * numberBytes
        }
        var recent = form.sinks + form.window + CacheForm.step
        let coded = form.flushed(positions)
        var rows = coded > 0 ? Self.capacity(coded) : 0
        if coded > 0 { recent += CacheForm.step }
        if let ring = form.ring { rows = min(rows, ring) }
        let full = 2 * row * Double(recent) * numberBytes
        return (full + row * Double(rows) * pairBits(form) / 8).rounded(.down)
    }

    /// Rows allocated to hold `rows`: a multiple of 256, or of an eighth of a power of two.
    static func capacity(_ rows: Int) -> Int {
        let width = Int.bitWidth - rows.leadingZeroBitCount
        let step = max(256, 1 << max(0, width - 4))
        return (rows + step - 1) / step * step
    }

    /// Bits of a number of a key and of one of a value.
    private func pairBits(_ form: CacheForm) -> Double {
        [form.keyBits, form.valueBits].reduce(0) { sum, bits in
            guard bits != CacheForm.fullBits, let size = try? CacheForm.groupSize(headDim: config.headDim)
            else { return sum + 8 * numberBytes }
            return sum + Double(bits) + 32 / Double(size)
        }
    }

    private func rowsCopied(_ form: CacheForm, _ context: Int, _ length: Int) -> Int {
        if form.isQuantized { return length + form.sinks + form.window + CacheForm.step }
        guard let bound = form.bound, context > bound else { return 0 }
        return length + bound
    }

    /// Positions that attention of the last chunk reads.
    private func positionsSeen(_ form: CacheForm, _ context: Int, _ length: Int) -> Int {
        guard let ring = form.ring, let bound = form.bound, context > bound else { return context }
        return form.sinks + ring + (form.isQuantized ? 2 * length + form.window : length)
    }

    private func settings(
        _ context: Int, _ form: CacheForm?, _ prefillStep: Int?, _ bounds: Bool
    ) -> [(CacheForm, Int)] {
        let forms = form.map { [$0] } ?? possibleForms
        let steps = prefillStep.map { [$0] } ?? Self.prefillSteps
        let comfortable = steps.filter { $0 >= Self.comfortableStep }
        var found = forms.flatMap { form in
            (comfortable.isEmpty ? steps : comfortable).map { (form, $0) }
        }
        found += forms.flatMap { form in steps.map { (form, $0) } }
        if bounds, form == nil, let least = forms.last {
            var bound = context / 2
            while bound >= Self.leastContext {
                if let bounded = try? least.bounded(bound) { found += steps.map { (bounded, $0) } }
                bound /= 2
            }
        }
        return found
    }

    private func refusal(
        _ limit: Int, _ context: Int, _ form: CacheForm?, _ prefillStep: Int?
    ) -> ApertusError {
        let smallest = possibleForms.last ?? .full
        let leastStep = Self.prefillSteps.last ?? 32
        let (wanted, step) = (form ?? smallest, prefillStep ?? leastStep)
        let needed = footprint(wanted, context: context, prefillStep: step)
        let missing = formatBytes(needed.totalBytes - limit, roundUp: true)
        let message =
            "\(context) tokens of context need \(shown(needed.totalBytes)) (weights "
            + "\(shown(needed.weightsBytes)), cache \(shown(needed.kvBytes)) at \(wanted), working "
            + "memory \(shown(needed.prefillBytes)) at prefill steps of \(step)), \(missing) more than "
            + "the \(formatBytes(limit)) there are; "
        return ApertusError(.resource, message + nextChoice(limit, context, smallest, leastStep))
    }

    /// What would fit: a shorter context, the model in fewer bits, or another model.
    private func nextChoice(_ limit: Int, _ context: Int, _ form: CacheForm, _ step: Int) -> String {
        let fits = largestContext(limitBytes: limit, form, prefillStep: step)
        if fits >= Self.leastContext {
            let cache = form.isQuantized ? "a cache of \(form.keyBits) bits, " : ""
            return "what would fit: \(cache)prefill steps of \(step) and at most \(fits) tokens in all"
        }
        let short = min(context, Self.leastContext)
        let least = footprint(form, context: short, prefillStep: step).totalBytes
        for bits in [4, 3, 2] {
            guard let format = try? QuantizedFormat(bits: bits, groupSize: 64) else { continue }
            let other = MemoryPlanner(config, MemoryTerms(config, format, like: terms))
                .footprint(form, context: short, prefillStep: step).totalBytes
            if other < least, other <= limit {
                return "what would fit: the model at \(bits) bits (\(short) tokens from "
                    + "\(shown(other)) on), apertus-mlx convert --bits \(bits) of its original"
            }
        }
        return "\(short) tokens run from \(shown(least)) on; take a smaller model"
    }

    /// The largest number up to `most` that passes, where all below one that passes do; 0 if none.
    private func largest(upTo most: Int, _ passes: (Int) -> Bool) -> Int {
        var (low, high) = (0, most)
        while low < high {
            let middle = (low + high) / 2
            if passes(middle + 1) { low = middle + 1 } else { high = middle }
        }
        return low
    }

    /// Whole bytes; what no machine has is cut off.
    private func bytes(_ number: Double) -> Int { number < 1e18 ? Int(number) : 1 << 60 }

    private func shown(_ bytes: Int) -> String { formatBytes(bytes, roundUp: true) }
}

/// Bytes in decimal units, as app stores count them.
///
/// - Parameter roundUp: for what something needs, so that a limit of the size that is shown suffices.
package func formatBytes(_ count: Int, roundUp: Bool = false) -> String {
    let (unit, scale, digits) =
        count < 1000
        ? ("B", 1, 0)
        : count < 1_000_000
            ? ("kB", 1000, 1)
            : count < 1_000_000_000 ? ("MB", 1_000_000, 1) : ("GB", 1_000_000_000, 2)
    let step = digits == 2 ? scale / 100 : digits == 1 ? scale / 10 : 1
    let whole = roundUp ? (count + step - 1) / step * step : count
    return String(format: "%.\(digits)f \(unit)", Double(whole) / Double(scale))
}
