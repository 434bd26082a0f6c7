import Foundation
import Testing

@testable import ApertusCore

/// Folders that Python accepts or refuses: the same here, before any array is read.
@Suite struct CheckpointTests {
    @Test func verdictsArePythons() throws {
        let verdicts = try #require(try Fixtures.json("checkpoints.json").items)
        #expect(verdicts.count > 90)
        for verdict in verdicts {
            let name = try #require(verdict["folder"]?.text)
            let folder = try Fixtures.folder.appendingPathComponent("checkpoints/\(name)")
            let result = Result { try Checkpoint(folder: folder) }
            if let wanted = verdict["accepted"] {
                switch result {
                case .success(let checkpoint): check(checkpoint, wanted, name)
                case .failure(let error): Issue.record("\(name): Python accepts it; \(error)")
                }
                continue
            }
            let error = #expect(throws: ApertusError.self, "\(name)") { try result.get() }
            let words = try #require(verdict["refused"]?.text)
            let message = (error?.description ?? "")
                .replacingOccurrences(of: folder.filePath, with: "FOLDER")
            if name == "gptq" {
                // Told from the config alone.
                #expect(message.hasSuffix("convert them first: apertus-mlx convert"))
            } else if name == "hostile-product-beyond-264" {
                #expect(message.contains("tensor 'a': F32 [1073741824, 1073741824, 1073741824] takes"))
            } else {
                #expect(message.hasPrefix(words), "\(name): \(message) instead of \(words)")
            }
        }
    }

    private func check(_ checkpoint: Checkpoint, _ wanted: JSON, _ name: String) {
        let formats = (wanted["formats"]?.members ?? []).map {
            (String(decoding: $0.key, as: UTF8.self), $0.value.text)
        }
        #expect(checkpoint.formats.mapValues(\.description) == Dictionary(uniqueKeysWithValues: formats))
        let factors = checkpoint.matrices.values.compactMap { matrix in
            switch matrix.factor {
            case .scale(let tensor), .divisor(let tensor): tensor.name
            case nil: nil
            }
        }
        func texts(_ key: String) -> [String]? { wanted[key]?.items?.compactMap(\.text) }
        #expect(texts("factors") == factors.sorted(), "\(name)")
        #expect(texts("dropped") == checkpoint.dropped.keys.sorted(), "\(name)")
        #expect(texts("absent") == checkpoint.absentConstants.keys.sorted(), "\(name)")
        #expect(texts("float_types") == checkpoint.floatTypes.sorted(), "\(name)")
    }

    @Test func everyTensorLiesWhereTheFileHasIt() throws {
        let folder = try Fixtures.folder.appendingPathComponent("checkpoints/codes")
        let checkpoint = try Checkpoint(folder: folder)
        let content = try Data(contentsOf: folder.appendingPathComponent("model.safetensors"))
        let eps = try #require(checkpoint.vectors["model.layers.0.mlp.act_fn.beta"])
        #expect(content[eps.offset ..< eps.offset + eps.byteCount].elementsEqual([0x00, 0x3F]))  // 0.5
        let ends = checkpoint.files.tensors.values.map { $0.offset + $0.byteCount }
        #expect(ends.max() == content.count)
    }
}

/// Bytes, contexts and choices: those of `apertus-mlx plan`.
@Suite struct MemoryPlanTests {
    @Test func numbersArePythons() throws {
        var compared = 0
        for verdict in try #require(try Fixtures.json("checkpoints.json").items) {
            guard let plans = verdict["accepted"]?["plans"]?.items else { continue }
            let name = try #require(verdict["folder"]?.text)
            let folder = try Fixtures.folder.appendingPathComponent("checkpoints/\(name)")
            let checkpoint = try Checkpoint(folder: folder)
            for plan in plans {
                let terms = MemoryTerms(checkpoint, on: plan["on_gpu"]?.flag == true ? .gpu : .cpu)
                let planner = MemoryPlanner(checkpoint.config, terms)
                for entry in plan["footprints"]?.items ?? [] {
                    try compare(planner, entry, name)
                    compared += 1
                }
                for entry in plan["choices"]?.items ?? [] { try compareChoice(planner, entry, name) }
            }
        }
        #expect(compared > sized(5000, 1000))
    }

    private func compare(_ planner: MemoryPlanner, _ entry: JSON, _ name: String) throws {
        let written = try #require(entry["form"])
        let form = try CacheForm(
            keyBits: written["key_bits"]?.int ?? 0, valueBits: written["value_bits"]?.int,
            bound: written["bound"]?.int, sinks: written["sinks"]?.int ?? 0,
            window: written["window"]?.int ?? 0)
        #expect(form.description == entry["words"]?.text)
        let found = planner.footprint(
            form, context: entry["context"]?.int ?? 0, prefillStep: entry["step"]?.int ?? 0)
        let parts = [
            found.weightsBytes, found.kvBytes, found.prefillBytes, found.logitsBytes, found.totalBytes,
        ]
        #expect(parts == entry["parts"]?.items?.compactMap(\.int), "\(name): \(entry.shown)")
        #expect(planner.kvBytesPerPosition(form) == entry["per_token"]?.double)
    }

    private func compareChoice(_ planner: MemoryPlanner, _ entry: JSON, _ name: String) throws {
        let limit = try #require(entry["limit"]?.int)
        let largest = planner.largestContext(limitBytes: limit, .full, prefillStep: 128)
        #expect(largest == entry["largest"]?.int, "\(name): \(limit)")
        let context = try #require(entry["context"]?.int)
        guard let chosen = entry["chosen"]?.items else {
            let error = #expect(throws: ApertusError.self) {
                try planner.plan(limitBytes: limit, context: context, bounds: true)
            }
            #expect(error?.kind == .resource)
            #expect(error?.description.contains("more than the") == true)
            return
        }
        let plan = try planner.plan(limitBytes: limit, context: context, bounds: true)
        #expect(plan.form.description == chosen[0].text, "\(name): \(entry.shown)")
        #expect(plan.prefillStep == chosen[1].int, "\(name): \(entry.shown)")
        #expect(plan.footprint.totalBytes == chosen[2].int)
        #expect(plan.bufferCacheBytes == chosen[3].int)
    }

    @Test func theRefusalSaysWhatIsMissingAndWhatWouldFit() throws {
        let folder = try Fixtures.folder.appendingPathComponent("checkpoints/converted-bf16")
        let checkpoint = try Checkpoint(folder: folder)
        let planner = MemoryPlanner(checkpoint.config, MemoryTerms(checkpoint))
        func message(_ limit: Int, _ context: Int) -> String {
            let error = #expect(throws: ApertusError.self) {
                try planner.plan(limitBytes: limit, context: context)
            }
            return error?.description ?? ""
        }
        let longest = checkpoint.config.maxPositions
        let short = planner.footprint(
            try CacheForm(keyBits: 3), context: 600, prefillStep: 32
        ).totalBytes
        let fewer = message(short, longest)
        #expect(fewer.contains("and at most ") && fewer.contains("MB more than the "), "\(fewer)")
        let four = MemoryTerms(
            checkpoint.config, try QuantizedFormat(bits: 4, groupSize: 64), like: MemoryTerms(checkpoint))
        let least = MemoryPlanner(checkpoint.config, four).footprint(
            try CacheForm(keyBits: 3), context: 512, prefillStep: 32)
        #expect(message(least.totalBytes, longest).contains("apertus-mlx convert --bits 4"))
        #expect(message(1, longest).contains("take a smaller model"))
        #expect(throws: ApertusError.self) {
            try planner.plan(limitBytes: 1 << 40, context: longest + 1)
        }
    }
}
